"""Environment variables are parsed strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyfp4 import envs
from anyfp4.errors import EnvironmentVariableError


def test_defaults_and_values() -> None:
    default = envs.read({"HOME": "/home/x"})
    assert (default.backend, default.numerics) == ("auto", "native")
    assert default.cache == Path.home() / ".cache" / "anyfp4"
    assert envs.read({"XDG_CACHE_HOME": "/c"}).cache == Path("/c/anyfp4")
    got = envs.read({"ANYFP4_BACKEND": "reference", "ANYFP4_NUMERICS": "blackwell", "ANYFP4_CACHE": "/d"})
    assert (got.backend, got.numerics, got.cache) == ("reference", "blackwell", Path("/d"))


@pytest.mark.parametrize(
    ("environ", "match"),
    [
        ({"ANYFP4_NUMERICS": "1"}, "ANYFP4_NUMERICS='1': must be one of native, blackwell"),
        ({"ANYFP4_BACKEND": ""}, "ANYFP4_BACKEND is empty"),
        ({"ANYFP4_CACHE": ""}, "ANYFP4_CACHE is empty"),
        ({"ANYFP4_BACKENDS": "x"}, "did you mean ANYFP4_BACKEND"),
        ({"ANYFP4_ZZZ": "x"}, "known: ANYFP4_API_KEY"),
    ],
)
def test_mistakes(environ: dict[str, str], match: str) -> None:
    with pytest.raises(EnvironmentVariableError, match=match):
        envs.read(environ)
