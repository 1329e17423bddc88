"""What the Triton backend does without a kernel of its own, and so without a GPU."""

from __future__ import annotations

import pytest
import torch

from anyfp4.backends.triton import TritonBackend
from anyfp4.formats.weights import FP8Weight
from anyfp4.ops.linear import linear
from anyfp4.testing.bitwise import assert_same_bits


@pytest.mark.parametrize(
    ("scales", "weight_only"), [((2, 3), False), ((2, 3), True), ((1,), True), ((200,), True)], ids=str
)
def test_other_fp8_weights_run_as_in_the_reference(scales: tuple[int, ...], weight_only: bool) -> None:
    g = torch.Generator().manual_seed(3)
    weight = FP8Weight(
        (torch.randn(200, 300, generator=g) * 80).to(torch.float8_e4m3fn),
        torch.rand(*scales, generator=g) * 0.01 + 1e-4,
        weight_only=weight_only,
    )
    x = torch.randn(5, 300, generator=g).bfloat16()
    backend = TritonBackend()
    prepared = backend.prepare(weight)
    assert prepared.backend == "triton" and prepared.nbytes == weight.nbytes
    whole = backend.linear(x, prepared, torch.float32)
    assert_same_bits(whole, linear(x, weight, out_dtype=torch.float32))
    assert_same_bits(backend.linear(x[2:3], prepared, torch.float32), whole[2:3])
