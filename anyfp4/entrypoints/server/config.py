"""What a user may set of the server itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from anyfp4.errors import InvalidArgumentError


@dataclass(frozen=True)
class ServerConfig:
    """How the server listens and what it refuses.

    Attributes:
        host: address to bind; the default can be reached from this machine alone.
        port: 0 lets the system choose.
        served_model_name: what clients call the model; None: the folder's name, or the id.
        api_key: that clients must send; None: no key.
        max_queue: sequences that wait at most; one more is answered with 429.
        max_body_bytes: of a request's body.
        body_timeout: seconds in which a body must have arrived.
        drain_timeout: seconds that running requests get after SIGTERM.
        log_requests: a line for each request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    max_queue: int = 256
    max_body_bytes: int = 8 * 2**20
    body_timeout: float = 60.0
    drain_timeout: float = 30.0
    log_requests: bool = True

    def __post_init__(self) -> None:
        _require(bool(self.host), "--host must not be empty")
        _require(0 <= self.port < 65536, f"--port must be 0 to 65535, got {self.port}")
        _require(self.served_model_name != "", "--served-model-name must not be empty")
        key = self.api_key
        _require(
            key is None or (bool(key) and key.isascii() and key.isprintable() and " " not in key),
            "--api-key must be printable ASCII without spaces, and not empty",
        )
        _require(self.max_queue >= 0, f"--max-queue must be 0 or more, got {self.max_queue}")
        _require(self.max_body_bytes >= 1, "--max-body-mb must be more than 0")
        _require(self.body_timeout > 0, f"body_timeout must be more than 0, got {self.body_timeout}")
        _require(0 <= self.drain_timeout < float("inf"), f"--drain-timeout must be 0 or more, got {self.drain_timeout}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidArgumentError(message)
