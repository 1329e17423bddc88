"""One launch of each kernel of backend ``hopper``, for Nsight Compute:

    ncu --clock-control none --profile-from-start off --page raw --csv --section … python -m benchmarks.profile_hopper

Prints a line for each launch, in order: what, N, K, M. Kernels are compiled and have run once before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from anyfp4.backends import registry
from anyfp4.backends.triton import TritonBackend
from anyfp4.errors import BackendError
from anyfp4.kernels.hopper import quantize
from benchmarks.random_model import random_weight

#: (N, K), and the numbers of tokens
SHAPES = (
    ((24576, 4096), (1, 16, 64, 256, 4096)), ((57344, 8192), (1,)), ((4096, 12288), (1, 16, 256)),
    ((4096, 4096), (1, 16)),
)  # fmt: skip


def main() -> None:
    try:
        backend = registry.select(torch.device("cuda"), requested="hopper")
    except BackendError as error:
        sys.exit(str(error))
    assert isinstance(backend, TritonBackend)
    launches = [launch for shape, tokens in SHAPES for launch in launches_of(backend, *shape, tokens)]
    for _, call in launches:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for name, call in launches:
        call()
        print(name, flush=True)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def launches_of(
    backend: TritonBackend, n: int, k: int, tokens: tuple[int, ...]
) -> list[tuple[str, Callable[[], object]]]:
    """The product in both numerics and the quantization, for each number of tokens."""
    weight = random_weight(n, k, torch.device("cuda"))
    native, blackwell = backend.prepare(weight), backend.prepare(weight, "blackwell")
    found: list[tuple[str, Callable[[], object]]] = []
    for m in tokens:
        x = torch.randn(m, k, device="cuda").bfloat16()
        scales = native.data.inverse_scales
        values, blocks = quantize.quantize_blocks(x, scales)
        for name, layer in (("native", native), ("blackwell", blackwell)):
            found.append((
                f"{name} {n} {k} {m}",
                lambda v=values, b=blocks, y=layer: backend.quantized_linear(v, b, y, torch.bfloat16),
            ))  # fmt: skip
        found.append((f"quantize {n} {k} {m}", lambda x=x, s=scales: quantize.quantize_values(x, s)))
    return found


if __name__ == "__main__":
    main()
