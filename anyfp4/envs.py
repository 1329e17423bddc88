"""Every environment variable that anyfp4 reads, parsed strictly, in one place.

A value that is not allowed raises, and so does an ``ANYFP4_*`` name that nobody reads: a misspelt variable
that is silently ignored costs its owner an afternoon.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from anyfp4.errors import EnvironmentVariableError

#: name -> what it does (the text of ``docs/environment.md``)
VARIABLES: dict[str, str] = {
    "ANYFP4_BACKEND": "linear backend to use, as in `--backend`; a backend that cannot run raises. Default: auto",
    "ANYFP4_CACHE": "folder for downloaded demo models. Default: $XDG_CACHE_HOME/anyfp4 or ~/.cache/anyfp4",
    "ANYFP4_NUMERICS": "`native` or `blackwell`: the default of `--numerics`. Default: native",
    "ANYFP4_TEST_CHECKPOINTS": "folder with the real checkpoints that the marked tests read",
}
NUMERICS = ("native", "blackwell")


@dataclass(frozen=True)
class Environment:
    """The values of all variables."""

    backend: str
    cache: Path
    numerics: str


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
    return Environment(backend=backend, cache=_cache_folder(env), numerics=numerics)


def _cache_folder(env: Mapping[str, str]) -> Path:
    if "ANYFP4_CACHE" in env:
        if not env["ANYFP4_CACHE"]:
            raise EnvironmentVariableError("ANYFP4_CACHE is empty: unset it, or name a folder")
        return Path(env["ANYFP4_CACHE"]).expanduser()
    base = env.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "anyfp4"
