"""Every environment variable that anyfp4 reads, parsed strictly, in one place.

A value that is not allowed raises, and so does an ``ANYFP4_*`` name that nobody reads: a misspelt variable
that is silently ignored costs its owner an afternoon.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from anyfp4.errors import EnvironmentVariableError

#: name -> what it does (the text of ``docs/environment.md``)
VARIABLES: dict[str, str] = {
    "ANYFP4_API_KEY": "key that clients of `anyfp4 serve` must send, as in `--api-key`. Default: none is needed",
    "ANYFP4_BACKEND": "linear backend to use, as in `--backend`; a backend that cannot run raises. Default: auto",
    "ANYFP4_CACHE": "folder for downloaded demo models. Default: $XDG_CACHE_HOME/anyfp4 or ~/.cache/anyfp4",
    "ANYFP4_CPU_ISA": "instruction set of the CPU kernels: auto, avx512, avxvnni, avx2 or portable; one that this "
    "processor or build lacks raises. The bits do not depend on it. Default: auto",
    "ANYFP4_NUMERICS": "`native` or `blackwell`: the default of `--numerics`. Default: native",
    "ANYFP4_NUM_THREADS": "threads of the CPU kernels, 1 or more. The bits do not depend on it. Default: one for "
    "each processor that this process may use",
    "ANYFP4_TEST_CHECKPOINTS": "folder with the real checkpoints that the marked tests read",
    "ANYFP4_VLLM": "where the vLLM plugin serves NVFP4 linear layers: `auto` on CPUs, on NVIDIA GPUs before Blackwell "
    "and on AMD's; `always` on Blackwell too; `off` nowhere. A linear backend that vLLM was told to use wins over "
    "both. Default: auto",
}
NUMERICS = ("native", "blackwell")
VLLM = ("auto", "always", "off")
MAX_THREADS = 1024
CPU_ISAS = ("auto", "avx512", "avxvnni", "avx2", "portable")


@dataclass(frozen=True)
class Environment:
    """The values of all variables."""

    backend: str
    cache: Path
    numerics: str
    cpu_isa: str = "auto"
    num_threads: int | None = None
    vllm: str = "auto"
    api_key: str | None = field(default=None, repr=False)


def read(environ: Mapping[str, str] | None = None) -> Environment:
    """Reads and checks the environment.

    Args:
        environ: the variables; the process's own by default.

    Raises:
        EnvironmentVariableError: a value is not allowed, or an ``ANYFP4_*`` name is unknown.
    """
    env = os.environ if environ is None else environ
    for name in env:
        if name.startswith("ANYFP4_") and name not in VARIABLES:
            close = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.85)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(VARIABLES))}"
            raise EnvironmentVariableError(f"unknown environment variable {name}{hint}")
    numerics = env.get("ANYFP4_NUMERICS", "native")
    if numerics not in NUMERICS:
        raise EnvironmentVariableError(f"ANYFP4_NUMERICS={numerics!r}: must be one of {', '.join(NUMERICS)}")
    backend = env.get("ANYFP4_BACKEND", "auto")
    if not backend:
        raise EnvironmentVariableError("ANYFP4_BACKEND is empty: unset it, or name a backend (`anyfp4 backends`)")
    isa = env.get("ANYFP4_CPU_ISA", "auto")
    if isa not in CPU_ISAS:
        raise EnvironmentVariableError(f"ANYFP4_CPU_ISA={isa!r}: must be one of {', '.join(CPU_ISAS)}")
    vllm = env.get("ANYFP4_VLLM", "auto")
    if vllm not in VLLM:
        raise EnvironmentVariableError(f"ANYFP4_VLLM={vllm!r}: must be one of {', '.join(VLLM)}")
    key = env.get("ANYFP4_API_KEY")
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise EnvironmentVariableError("ANYFP4_API_KEY must be printable ASCII without spaces, and not empty")
    return Environment(
        backend=backend,
        cache=_cache_folder(env),
        numerics=numerics,
        cpu_isa=isa,
        num_threads=_thread_count(env.get("ANYFP4_NUM_THREADS")),
        vllm=vllm,
        api_key=key,
    )


def _thread_count(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_THREADS):
        raise EnvironmentVariableError(f"ANYFP4_NUM_THREADS={text!r}: must be a number from 1 to {MAX_THREADS}")
    return int(text)


def _cache_folder(env: Mapping[str, str]) -> Path:
    if "ANYFP4_CACHE" in env:
        if not env["ANYFP4_CACHE"]:
            raise EnvironmentVariableError("ANYFP4_CACHE is empty: unset it, or name a folder")
        return Path(env["ANYFP4_CACHE"]).expanduser()
    base = env.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "anyfp4"
