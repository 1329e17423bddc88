"""``anyfp4 serve``: from options to a running server."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from anyfp4 import device as devices
from anyfp4 import envs
from anyfp4.engine.config import EngineConfig
from anyfp4.entrypoints.console import byte_progress, step_progress
from anyfp4.entrypoints.server.config import ServerConfig
from anyfp4.errors import InvalidArgumentError, UnsupportedError

#: tokens of a step that take some hundred milliseconds at most
_STEP_TOKENS = {"cpu": 512, "cuda": 2048}
_EXTRA = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class Options:
    """What the command line says; the names are the flags'."""

    model: str
    revision: str | None
    numerics: str | None
    backend: str | None
    device: str | None
    dtype: str
    max_model_len: int | None
    max_num_seqs: int
    max_step_tokens: int | None
    block_size: int
    kv_cache_gib: float | None
    memory_fraction: float | None
    prefix_caching: bool
    cuda_graphs: bool | None
    async_scheduling: bool | None
    host: str
    port: int
    served_model_name: str | None
    api_key: str | None
    max_queue: int
    max_body_mb: float
    drain_timeout: float
    log_requests: bool

    def engine(self) -> EngineConfig:
        """The engine's share.

        Raises:
            InvalidArgumentError: a value is not allowed.
        """
        gib = self.kv_cache_gib
        if gib is not None and not 0 < gib < 2**20:
            raise InvalidArgumentError(f"--kv-cache-gib must be more than 0, got {gib}")
        return EngineConfig(
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_step_tokens=self._step_tokens(),
            block_size=self.block_size,
            kv_cache_bytes=None if gib is None else int(gib * 2**30),
            memory_fraction=self.memory_fraction,
            enable_prefix_caching=self.prefix_caching,
            cuda_graphs=self.cuda_graphs,
            async_scheduling=self.async_scheduling,
        )

    def _step_tokens(self) -> int:
        if self.max_step_tokens is not None:
            return self.max_step_tokens
        return _STEP_TOKENS[devices.resolve(self.device).type]

    def server(self) -> ServerConfig:
        """The server's share.

        Raises:
            InvalidArgumentError: a value is not allowed.
        """
        if not 0 < self.max_body_mb < 2**20:
            raise InvalidArgumentError(f"--max-body-mb must be more than 0, got {self.max_body_mb}")
        return ServerConfig(
            host=self.host,
            port=self.port,
            served_model_name=self.served_model_name,
            api_key=envs.read().api_key if self.api_key is None else self.api_key,
            max_queue=self.max_queue,
            max_body_bytes=int(self.max_body_mb * 1e6),
            drain_timeout=self.drain_timeout,
            log_requests=self.log_requests,
        )


def run(options: Options) -> None:
    """Loads the model and serves it until a signal.

    Raises:
        UnsupportedError: packages of the ``serve`` extra are missing.
        InvalidArgumentError: an option is wrong, or the address cannot be bound.
    """
    missing = [name.replace("_", "-") for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"anyfp4 serve needs {', '.join(missing)}: pip install 'anyfp4[serve]'")
    engine, server = options.engine(), options.server()
    # everything that can be told before is told before these imports and the load, which take seconds
    from anyfp4.entrypoints.server import run as serving  # noqa: PLC0415
    from anyfp4.llm import LLM  # noqa: PLC0415

    bound = serving.listen(server)
    with byte_progress(f"loading {options.model}") as progress:
        llm = LLM(
            options.model,
            revision=options.revision,
            numerics=options.numerics,
            backend=options.backend,
            device=options.device,
            dtype=options.dtype,
            config=engine,
            progress=progress,
        )
    with step_progress("preparing kernels", "steps") as advance:
        llm.engine.warm_up(advance)
    serving.run(llm, server, bound, f"numerics {options.numerics or envs.read().numerics}")
