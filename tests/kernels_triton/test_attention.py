"""Attention in Triton: values against float64, and one token's bits whatever stands beside it and however it is cut."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

from anyfp4.device import architecture
from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton import attention, workspace
from anyfp4.kernels.triton.quantize import quantize_values
from anyfp4.ops.attention import AttentionBatch
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels.cases import DTYPES, generator
from tests.kernels_triton.test_fused import check_sizes

FP8 = torch.float8_e4m3fn
#: unit roundoff: a rounded number is off by at most this part of itself
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


@dataclass(frozen=True)
class Sequences:
    """Cached keys and values of some sequences, their blocks scattered, and the queries at all of their positions."""

    q: list[torch.Tensor]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    table: torch.Tensor
    options: dict[str, float | int | None]

    def run(self, *spans: tuple[int, int, int], division: attention.Launch | None = None) -> list[torch.Tensor]:
        """Attention of spans (sequence, first position, end) in one step; the last span of a sequence is its end."""
        starts = torch.tensor([0, *[end - first for _, first, end in spans]]).cumsum(0).to(torch.int32)
        device = self.k_cache.device
        batch = AttentionBatch(
            starts.to(device),
            torch.tensor([end for _, _, end in spans], dtype=torch.int32, device=device),
            self.table[[s for s, _, _ in spans]].contiguous(),
            torch.empty(0, dtype=torch.int64, device=device),
        )
        q = torch.cat([self.q[s][first:end] for s, first, end in spans])
        out = attention.attention(q, self.k_cache, self.v_cache, batch, **self.options, division=division)
        return list(out.split([end - first for _, first, end in spans]))


def make(
    device: torch.device, lengths: list[int], *, group: int = 2, kv_heads: int = 2, dim: int = 16, block_size: int = 16,
    dtype: torch.dtype = torch.float16, cache: torch.dtype | None = None, window: int | None = None, seed: int = 0,
    sharp: float = 1.0,
) -> Sequences:  # fmt: skip
    g = generator(seed)
    needed = [math.ceil(n / block_size) for n in lengths]
    blocks = sum(needed) + 2
    order = torch.randperm(blocks, generator=g).tolist()
    table = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32)
    shape = (blocks, block_size, kv_heads, dim)
    caches = [torch.full(shape, torch.nan) for _ in range(2)]
    for s, count in enumerate(needed):
        mine = [order.pop() for _ in range(count)]
        table[s, :count] = torch.tensor(mine, dtype=torch.int32)
        for cache_ in caches:
            for p in range(lengths[s]):
                cache_[mine[p // block_size], p % block_size] = torch.randn(kv_heads, dim, generator=g)
    q = [(torch.randn(n, group * kv_heads, dim, generator=g) * sharp).to(dtype).to(device) for n in lengths]
    k_cache, v_cache = (c.to(cache or dtype).to(device) for c in caches)
    scales = (0.7, 1.3) if cache == FP8 else (1.0, 1.0)
    options = {"scale": dim**-0.5, "sliding_window": window, "k_scale": scales[0], "v_scale": scales[1]}
    return Sequences(q, k_cache, v_cache, table.to(device), options)


def check_values(case: Sequences, s: int, first: int, got: torch.Tensor) -> None:
    """Every output against float64, within what the roundings add up to."""
    block_size = case.k_cache.shape[1]
    blocks = case.table[s].cpu().long()
    k, v = (c.cpu().float().double()[blocks].flatten(0, 1) for c in (case.k_cache, case.v_cache))
    group = case.q[s].shape[1] // case.k_cache.shape[2]
    scale = float(case.options["scale"] or 0) * float(case.options["k_scale"] or 0)
    window = case.options["sliding_window"]
    weight_type = torch.float16 if case.k_cache.dtype == FP8 and got.dtype != torch.float32 else case.k_cache.dtype
    weight_type = torch.float32 if weight_type == FP8 else weight_type
    assert block_size * len(blocks) >= first + got.shape[0]
    for i in range(got.shape[0]):
        position = first + i
        begin = 0 if window is None else max(0, position - int(window) + 1)
        for h in range(got.shape[1]):
            keys, values = (t[begin : position + 1, h // group] for t in (k, v))
            q = case.q[s][position, h].cpu().double()
            p = torch.softmax(keys @ q * scale, dim=0)
            expected = p @ values * float(case.options["v_scale"] or 0)
            spread = p @ values.abs() * float(case.options["v_scale"] or 0)
            # a score is a sum of D products, each addition off by at most 2⁻²³ (matrix units truncate), and as much
            # again for the scale and the exponential; it counts above and below the fraction
            score = (q.numel() + 8) * 2.0**-23 * float((keys.abs() @ q.abs()).max()) * scale
            relative = ROUNDOFF[weight_type] + 2 * score + 2 * (len(p) + 16) * 2.0**-23
            bound = relative * spread + ROUNDOFF[got.dtype] * expected.abs() + 2.0**-24
            assert ((got[i, h].cpu().double() - expected).abs() <= bound).all(), f"position {position} head {h}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", [None, FP8])
@pytest.mark.parametrize("window", [None, 21])
def test_values(device: torch.device, dtype: torch.dtype, cache: torch.dtype | None, window: int | None) -> None:
    case = make(device, [37, 5, 150], dtype=dtype, cache=cache, window=window)
    spans = ((0, 0, 37), (1, 4, 5), (2, 131, 150))
    for (s, first, _), got in zip(spans, case.run(*spans), strict=True):
        check_values(case, s, first, got)


@pytest.mark.parametrize(
    ("dim", "dtype", "pre", "division"),
    [(16, torch.bfloat16, False, attention.Launch(16, 64, 32, programs=0)), (80, torch.float16, True, None)],
)
def test_quantized_as_by_the_next_kernel(
    device: torch.device, dim: int, dtype: torch.dtype, pre: bool, division: attention.Launch | None
) -> None:
    """In a prompt and in decode, shared and not, with values that are not finite, for several scales at once."""
    case = make(device, [150, 5, 37], dim=dim, group=3, dtype=dtype)
    case.v_cache[case.table[2, 0], 3, 1, 7] = torch.inf
    width = 6 * dim
    inverse = torch.tensor([20.0, 300.0], device=device)
    factors = (torch.rand(width, generator=generator(3)) + 0.5).to(dtype).to(device) if pre else None
    for spans in (((0, 149, 150), (1, 4, 5), (2, 36, 37)), ((0, 100, 150), (2, 0, 37))):
        want = quantize_values(torch.cat(case.run(*spans, division=division)).flatten(1), inverse, factors)
        starts = torch.tensor([0, *[end - first for _, first, end in spans]]).cumsum(0).to(torch.int32)
        batch = AttentionBatch(
            starts.to(device),
            torch.tensor([end for _, _, end in spans], dtype=torch.int32, device=device),
            case.table[[s for s, _, _ in spans]].contiguous(),
            torch.empty(0, dtype=torch.int64, device=device),
        )
        q = torch.cat([case.q[s][first:end] for s, first, end in spans])
        got = attention.attention_quantize(
            q, case.k_cache, case.v_cache, batch, inverse, factors, **case.options, division=division
        )
        assert_same_bits(got[0], want[0])
        assert_same_bits(got[1], want[1])
        if len(spans) == 3:
            form = (torch.bfloat16, torch.int16)
            wide = attention.attention_quantize(
                q, case.k_cache, case.v_cache, batch, inverse, factors, *form, **case.options, division=division
            )
            check_sizes(got, wide)


@pytest.mark.parametrize(
    ("dim", "group", "block_size"), [(64, 4, 8), (80, 7, 64), (96, 1, 32), (128, 5, 16), (20, 3, 1)]
)
def test_shapes(device: torch.device, dim: int, group: int, block_size: int) -> None:
    case = make(device, [70], dim=dim, group=group, kv_heads=1, block_size=block_size)
    check_values(case, 0, 60, case.run((0, 60, 70))[0])


def test_wide_heads(device: torch.device) -> None:
    """The tile has fewer keys."""
    case = make(device, [40], dim=256, group=2, kv_heads=1, dtype=torch.float32)
    whole = case.run((0, 0, 40))[0]
    check_values(case, 0, 0, whole)
    assert_same_bits(case.run((0, 39, 40))[0], whole[39:])


@pytest.mark.parametrize(
    ("dtype", "cache", "window", "length"),
    [
        (torch.float16, None, None, 135),
        (torch.bfloat16, None, 70, 135),
        (torch.float32, None, 3, 135),
        (torch.bfloat16, FP8, None, 135),
        (torch.float32, FP8, 40, 135),
    ],
)
def test_chunks_and_decode_agree(
    device: torch.device, dtype: torch.dtype, cache: torch.dtype | None, window: int | None, length: int
) -> None:
    """A prompt in one piece, in chunks, among others, and token by token: the same bits for every token."""
    case = make(device, [length, 41], dtype=dtype, cache=cache, window=window, group=3, kv_heads=1, sharp=3.0)
    whole = case.run((0, 0, length))[0]
    cuts = [0, 1, 64, 65, 127, length]
    for first, end in pairwise(cuts):
        piece, _ = case.run((0, first, end), (1, 40, 41))
        assert_same_bits(piece, whole[first:end], f"positions {first} to {end}")
    for position in (63, 64, length - 2):
        alone = case.run((0, position, position + 1))[0]
        assert_same_bits(alone, whole[position : position + 1], f"position {position} alone")
    beside = case.run((1, 40, 41), (0, length - 1, length), (1, 7, 8), (0, 30, 31))
    assert_same_bits(beside[1], whole[length - 1 :])
    assert_same_bits(beside[3], whole[30:31])


def test_every_division_agrees(device: torch.device) -> None:
    """Programs that share a sequence's tiles, and one that does them all; how many rows it has, and when it merges."""
    case = make(device, [150, 60], dim=16, group=2, kv_heads=1, sharp=4.0, window=100)
    spans = ((0, 149, 150), (1, 59, 60))
    usual = replace(attention.launch(architecture(device), 16, 2, True), tile=16, sums=16)
    alone, *others = (
        torch.cat(case.run(*spans, division=replace(usual, **changed)))
        for changed in ({"programs": 0}, {"programs": 6}, {"programs": 99}, {"programs": 0, "rows": 64, "delay": True})
    )
    for other in others:
        assert_same_bits(other, alone)
    check_values(case, 0, 149, alone[:1])
    assert not workspace.of(case.k_cache).counters.any(), "counters are zero between launches"


def test_long_sequence(device: torch.device) -> None:
    """More tiles than are merged at a time."""
    case = make(device, [300], dim=16, group=1, kv_heads=1, sharp=4.0)
    usual = replace(attention.launch(architecture(device), 16, 2, True), tile=16, sums=16)
    (shared,), (alone,) = (case.run((0, 299, 300), division=replace(usual, programs=n)) for n in (4, 0))
    assert_same_bits(shared, alone)
    check_values(case, 0, 299, shared)


@pytest.mark.parametrize("group", [3, 17])
def test_every_row_has_a_program(device: torch.device, group: int) -> None:
    """Sequences without tokens among others, and groups of more heads than a program has rows."""
    case = make(device, [12, 9], group=group, kv_heads=1)
    whole = case.run((0, 0, 12), (1, 0, 9))
    division = attention.launch(architecture(device), 16, 2, True)
    spans = ((0, 5, 5), (1, 0, 7), (0, 9, 10), (1, 8, 8), (0, 3, 9), (1, 2, 2))
    for (s, first, end), got in zip(spans, case.run(*spans, division=division), strict=True):
        assert_same_bits(got, whole[s][first:end])


@pytest.mark.parametrize(
    ("which", "broken", "window"),
    [("k", math.nan, None), ("k", -math.inf, 40), ("v", math.nan, 40), ("v", math.inf, None), ("v", -math.inf, 40)],
)
def test_what_a_row_does_not_see_cannot_reach_it(
    device: torch.device, window: int | None, broken: float, which: str
) -> None:
    case = make(device, [110], dtype=torch.float32, window=window, group=2, kv_heads=1, block_size=16)
    clean = case.run((0, 0, 110))[0]
    at = 66
    block = int(case.table[0, at // 16])
    (case.k_cache if which == "k" else case.v_cache)[block, at % 16, 0, 3] = broken
    got = case.run((0, 0, 110))[0]
    last = 110 if window is None else at + window
    assert_same_bits(got[:at], clean[:at])
    assert_same_bits(got[last:], clean[last:])
    if which == "v":
        assert not got[at:last, :, 3].isfinite().any()
        assert_same_bits(got[at:last, :, 4:].contiguous(), clean[at:last, :, 4:].contiguous())
    for position in (at - 1, at, 100, 109):
        assert_same_bits(case.run((0, position, position + 1))[0], got[position : position + 1])


def test_padding_sequences(device: torch.device) -> None:
    """A sequence without tokens and one without keys disturb nobody; the latter's output is zero."""
    case = make(device, [50], group=2, kv_heads=1)
    expected = case.run((0, 49, 50))[0]
    zero = torch.zeros_like(case.q[0][:1])
    batch = AttentionBatch(
        torch.tensor([0, 0, 1, 2], dtype=torch.int32, device=device),
        torch.tensor([0, 50, 0], dtype=torch.int32, device=device),
        case.table.expand(3, -1).contiguous(),
        torch.empty(0, dtype=torch.int64, device=device),
    )
    q = torch.cat((case.q[0][49:50], case.q[0][:1]))
    got = attention.attention(q, case.k_cache, case.v_cache, batch, **case.options)
    assert_same_bits(got[:1], expected)
    assert_same_bits(got[1:], zero)


def test_strided_queries(device: torch.device) -> None:
    """Queries may be a view of the fused projection."""
    case = make(device, [20], group=2, kv_heads=2)
    whole = case.run((0, 0, 20))[0]
    qkv = torch.zeros(20, 8, 16, dtype=torch.float16, device=device)
    qkv[:, :4] = case.q[0]
    view = Sequences([qkv[:, :4]], case.k_cache, case.v_cache, case.table, case.options)
    assert_same_bits(view.run((0, 0, 20))[0], whole)


def test_bad_arguments(device: torch.device) -> None:
    case = make(device, [20])

    def call(**changed: object) -> None:
        batch = AttentionBatch(
            torch.tensor([0, 1], dtype=torch.int32, device=device),
            torch.tensor([20], dtype=torch.int32, device=device),
            case.table,
            torch.empty(0, dtype=torch.int64, device=device),
        )
        given = {"q": case.q[0][:1], "k_cache": case.k_cache, "v_cache": case.v_cache, "batch": batch, **case.options}
        attention.attention(**{**given, **changed})

    call()
    with pytest.raises(InvalidArgumentError, match="does not fit caches"):
        call(q=case.q[0][:1, :3])
    with pytest.raises(InvalidArgumentError, match="sliding_window"):
        call(sliding_window=0)
    with pytest.raises(InvalidArgumentError, match="must be positive and finite"):
        call(scale=0.0)
    with pytest.raises(InvalidArgumentError, match="the caches must be"):
        call(v_cache=case.v_cache.float())
    long = torch.tensor([0, 1], device=device)
    with pytest.raises(InvalidArgumentError, match=r"query_start must be torch\.int32"):
        call(batch=AttentionBatch(long, long[1:].int(), case.table, long))
    with pytest.raises(InvalidArgumentError, match="block_table"):
        call(batch=AttentionBatch(long.int(), long.int(), case.table, long))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "cache", "dim", "group", "window"),
    [
        (torch.bfloat16, None, 128, 4, None),
        (torch.bfloat16, FP8, 128, 8, None),
        (torch.float16, None, 64, 7, 700),
        (torch.bfloat16, None, 80, 1, None),
        (torch.float16, None, 96, 3, None),
        (torch.bfloat16, None, 256, 2, 100),
        (torch.float32, None, 64, 2, None),
    ],
)
def test_large(
    device: torch.device, dtype: torch.dtype, cache: torch.dtype | None, dim: int, group: int, window: int | None
) -> None:
    """Programs of 16 rows and of more take other matrix instructions: the bits must not show it."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    case = make(
        device, [1500, 700, 64], dim=dim, group=group, kv_heads=2, dtype=dtype, cache=cache, window=window, sharp=2.0
    )
    whole = case.run((0, 0, 1500), (1, 0, 700), (2, 0, 64))
    check_values(case, 0, 1490, whole[0][1490:])
    for first, end in pairwise([0, 1, 200, 333, 1024, 1500]):
        assert_same_bits(case.run((0, first, end))[0], whole[0][first:end], f"positions {first} to {end}")
    for position in [*range(0, 1500, 37), 1499]:
        alone = case.run((0, position, position + 1))[0]
        assert_same_bits(alone, whole[0][position : position + 1], f"position {position} alone")
    spans = [(i % 2, p, p + 1) for i, p in enumerate(range(3, 700, 5))]
    for (s, first, end), got in zip(spans, case.run(*spans), strict=True):
        assert_same_bits(got, whole[s][first:end], f"sequence {s} position {first} in a batch")


@pytest.mark.gpu
def test_in_a_cuda_graph(device: torch.device) -> None:
    """Captured once, replayed with other lengths: the bits of a plain launch."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    case = make(device, [900, 300], dim=64, group=4, kv_heads=2, dtype=torch.bfloat16)
    starts, lengths = (torch.tensor(t, dtype=torch.int32, device=device) for t in ([0, 1, 2], [1, 1]))
    batch = AttentionBatch(starts, lengths, case.table, torch.empty(0, dtype=torch.int64, device=device))
    q = torch.cat([case.q[0][:1], case.q[1][:1]])

    def launch() -> torch.Tensor:
        return attention.attention(q, case.k_cache, case.v_cache, batch, **case.options)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch()
    side = torch.cuda.Stream()
    for a, b in ((1, 300), (256, 257), (900, 12)):
        lengths.copy_(torch.tensor([a, b], dtype=torch.int32))
        q.copy_(torch.cat([case.q[0][a - 1 : a], case.q[1][b - 1 : b]]))
        side.wait_stream(torch.cuda.current_stream())
        graph.replay()
        # at the same time on another stream, with counters of its own
        with torch.cuda.stream(side):
            expected = torch.cat(case.run((0, a - 1, a), (1, b - 1, b)))
        torch.cuda.synchronize()
        assert_same_bits(out, expected)
        alone = replace(attention.launch(architecture(device), 64, 2, True), programs=0)
        assert_same_bits(out, torch.cat(case.run((0, a - 1, a), (1, b - 1, b), division=alone)))
