"""``anyfp4 verify --layers``: every op of every layer by itself, so that a difference gets a name.

A batch of sequences runs through the model op by op. Each op sees the same inputs again row by row, in chunks, in
another order, among other rows, with other numbers of threads; every row must come out with the same bits. A later op
gets the batch's own activations, so one bad op does not hide behind another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyfp4.engine import kv_cache
from anyfp4.layers.attention import LayerCache
from anyfp4.layers.linear import Linear
from anyfp4.models.decoder import Block, Decoder
from anyfp4.ops import sampling
from anyfp4.tools.verify_rows import BLOCK, BatchRows, OpDifference, first_difference
from anyfp4.tools.verify_run import set_threads, threads_restored

#: tokens of the sequences of the batch
LENGTHS = (1, 2, 5, 40, 16)
#: another block size, for the attention and the cache
_OTHER_BLOCK = 5
#: rows of the largest batch: kernels that change with the number of tokens do it below this
_MANY = 160

#: indices of the batch's rows, in any order -> the op's results for them, one row for each
RowOp = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OpCheck:
    """One op of one layer.

    Attributes:
        op: such as ``qkv`` or ``attention``.
        layer: number of the layer; None outside the layers.
        rows: comparisons of a row.
        difference: the first one; None if every row was the same.
    """

    op: str
    layer: int | None
    rows: int
    difference: OpDifference | None

    @property
    def name(self) -> str:
        """The op with its layer."""
        return self.op if self.layer is None else f"layers.{self.layer}.{self.op}"


def check_layers(
    model: Decoder,
    *,
    seed: int = 0,
    threads: Sequence[int] = (0,),
    lengths: Sequence[int] = LENGTHS,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[OpCheck]:
    """Checks all ops, in the order in which the model runs them.

    Args:
        model: the decoder.
        seed: of the tokens and of the ways to cut the batch.
        threads: numbers of threads to alternate between.
        lengths: tokens of the sequences of the batch, at most; cut to the model's positions.
        progress: called with (layers done, layers in all).
    """
    with threads_restored(model), model.ops.quiet():
        yield from _Walk(model, seed, threads, lengths, progress).ops()


class _Walk:
    def __init__(
        self,
        model: Decoder,
        seed: int,
        threads: Sequence[int],
        lengths: Sequence[int],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.model, self.threads, self.progress = model, threads, progress
        self.rng = random.Random(f"{seed}/layers")
        limit = model.cos_sin.shape[0]
        self.sequences = BatchRows([min(n, limit) for n in lengths], model.device)
        count = len(self.sequences.owner)
        vocab = model.config.vocab_size
        self.tokens = torch.tensor([self.rng.randrange(vocab) for _ in range(count)], device=model.device)
        self.all = torch.arange(count, device=model.device)
        self.checks: list[OpCheck] = []

    def ops(self) -> Iterator[OpCheck]:
        model, layers = self.model, self.model.config.num_layers
        x = self.check("embedding", None, lambda rows: model.embedding[self.tokens[rows]])
        yield from self._take()
        update: Tensor | None = None
        for layer, block in enumerate(model.blocks):
            if self.progress is not None:
                self.progress(layer, layers)
            x, update = self._layer(layer, block, x, update)
            yield from self._take()
        hidden, _ = self._norm("norm", None, x, update, model.norm)
        logits = self.check("lm_head", None, lambda rows: model.logits(hidden[rows]))
        self.check("log_softmax", None, lambda rows: model.ops.log_softmax(logits[rows]))
        self.check("sample", None, lambda rows: self._sample(logits, rows))
        yield from self._take()
        self._forward(hidden)
        yield from self._take()
        if self.progress is not None:
            self.progress(layers, layers)

    def _take(self) -> list[OpCheck]:
        done, self.checks = self.checks, []
        return done

    def _layer(self, layer: int, block: Block, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """One block, as ``layers.attention`` and ``layers.mlp`` run it."""
        model, a, mlp = self.model, block.attention, block.mlp
        normed, residual = self._norm("input_norm", layer, x, update, block.input_norm)
        qkv = self._linear("qkv", layer, a.qkv, normed)
        heads, kv_heads, dim = a.num_heads, a.num_kv_heads, a.head_dim
        q, k, v = qkv.view(-1, heads + 2 * kv_heads, dim).split((heads, kv_heads, kv_heads), dim=1)
        if a.q_norm is not None and a.k_norm is not None:
            q_norm, k_norm, q_in, k_in = a.q_norm, a.k_norm, q, k
            q = self.check("q_norm", layer, lambda rows: model.ops.rms_norm(q_in[rows], q_norm, a.eps))
            k = self.check("k_norm", layer, lambda rows: model.ops.rms_norm(k_in[rows], k_norm, a.eps))
        q, k = self._rope("rope_q", layer, q), self._rope("rope_k", layer, k)
        attended = self._attention(layer, block, q, k, v)
        x = self._linear("o", layer, a.o, attended.reshape(-1, heads * dim))
        x, residual = self._norm("post_attention_norm", layer, residual, x, block.post_attention_norm)
        gate_up = self._linear("gate_up", layer, mlp.gate_up, x)
        gated = self.check("silu_mul", layer, lambda rows: model.ops.silu_mul(gate_up[rows]))
        return residual, self._linear("down", layer, mlp.down, gated)

    def _linear(self, op: str, layer: int, linear: Linear, x: Tensor) -> Tensor:
        return self.check(op, layer, lambda rows: linear(x[rows]), sharp=lambda rows: linear(x[rows], torch.float32))

    def _norm(
        self, op: str, layer: int | None, residual: Tensor, update: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The norm, and the residual after the update is added to it."""
        ops, eps = self.model.ops, self.model.config.rms_norm_eps
        if update is None:
            return self.check(op, layer, lambda rows: ops.rms_norm(residual[rows], weight, eps)), residual
        both = self.check(
            op, layer, lambda rows: torch.stack(ops.add_rms_norm(update[rows], residual[rows], weight, eps), dim=1)
        )
        return both[:, 0].contiguous(), both[:, 1].contiguous()

    def _rope(self, op: str, layer: int, x: Tensor) -> Tensor:
        positions = self.sequences.positions
        return self.check(
            op, layer, lambda rows: self.model.ops.apply_rope(x[rows], positions[rows], self.model.cos_sin)
        )

    def _attention(self, layer: int, block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ops, a = self.model.ops, block.attention
        caches: dict[int, LayerCache] = {}

        def write(rows: Tensor) -> Tensor:
            cache, slots = self._cache(BLOCK), self.sequences.slots(BLOCK)[rows]
            ops.write_kv(k[rows], v[rows], cache.k, cache.v, slots, a.k_scale, a.v_scale)
            kept = torch.stack([_bytes(c).flatten(0, 1)[slots] for c in (cache.k, cache.v)], dim=1)
            return kept.flatten(1)

        def attend(rows: Tensor, block_size: int = BLOCK, dtype: torch.dtype = q.dtype) -> Tensor:
            cache = caches[block_size]
            return ops.attention(
                q[rows].to(dtype),
                cache.k,
                cache.v,
                self.sequences.batch(rows.tolist(), block_size),
                scale=a.head_dim**-0.5,
                sliding_window=a.sliding_window,
                k_scale=a.k_scale,
                v_scale=a.v_scale,
            )

        self.check("write_kv", layer, write)
        for block_size in (BLOCK, _OTHER_BLOCK):
            cache = caches[block_size] = self._cache(block_size)
            ops.write_kv(k, v, cache.k, cache.v, self.sequences.slots(block_size), a.k_scale, a.v_scale)
        return self.check(
            "attention",
            layer,
            attend,
            sharp=lambda rows: attend(rows, dtype=torch.float32),
            extra={"blocks of another size": lambda rows: attend(rows, _OTHER_BLOCK)},
        )

    def _cache(self, block_size: int) -> LayerCache:
        c = self.model.config
        blocks = sum(-(-n // block_size) for n in self.sequences.lengths)
        shape = (blocks, block_size, c.num_kv_heads, c.head_dim)
        k, v = (torch.zeros(shape, dtype=torch.float32, device=self.model.device) for _ in range(2))
        return LayerCache(k.to(self.model.kv_dtype), v.to(self.model.kv_dtype))

    def _sample(self, logits: Tensor, rows: Tensor) -> Tensor:
        choices = [
            sampling.Choice(temperature=0.8, top_k=50, top_p=0.95, seed=i, position=p)
            for i, p in ((i, int(self.sequences.positions[i])) for i in rows.tolist())
        ]
        return torch.tensor(sampling.sample(logits[rows], choices)).unsqueeze(-1)

    def _forward(self, op_by_op: Tensor) -> None:
        """The whole model in one call, by whatever path it takes: rows are grouped into sequences and chunks."""
        model, s = self.model, self.sequences

        def run(pieces: Sequence[Sequence[int]]) -> Tensor:
            caches = kv_cache.allocate(model, sum(map(len, s.blocks(BLOCK))), BLOCK)
            out = [
                model.forward(self.tokens[i], s.positions[i], caches, s.batch(rows))
                for rows, i in ((rows, torch.tensor(rows, device=model.device)) for rows in pieces)
            ]
            return torch.cat(out)

        rows = self.all.tolist()
        own = [[r for r in rows if s.owner[r] == i] for i in range(len(s.lengths))]
        expected = run([rows])
        count, difference = len(rows), first_difference(expected, op_by_op, self.all, "op by op")
        variants = {
            "each sequence alone": own,
            "token by token": [[r] for r in rows],
            "chunks of 3": [seq[i : i + 3] for seq in own for i in range(0, len(seq), 3)],
        }
        for variant, pieces in variants.items():
            if difference is not None:
                break
            set_threads(model, self.rng.choice(self.threads))
            count += len(rows)
            difference = first_difference(expected, run(pieces), self.all, variant)
        self.checks.append(OpCheck("forward", None, count, difference))

    def check(
        self,
        op: str,
        layer: int | None,
        run: RowOp,
        *,
        sharp: RowOp | None = None,
        extra: dict[str, RowOp] | None = None,
    ) -> Tensor:
        """Runs an op on all rows, then again in other ways.

        Args:
            op: its name.
            layer: its layer.
            run: the op as the model runs it.
            sharp: the same with a float32 result: rounding to 16 bits hides most differences of the last bit.
            extra: other ways to run it.

        Returns:
            The result of ``run`` on all rows.
        """
        set_threads(self.model, 0)
        expected = run(self.all)
        ways = [(variant, pieces, expected, run) for variant, pieces in self._variants()]
        ways += [(variant, [self.all], expected, other) for variant, other in (extra or {}).items()]
        if sharp is not None:
            exact = sharp(self.all)
            ways += [(f"{variant}, in float32", pieces, exact, sharp) for variant, pieces in self._variants()]
        count, difference = self._compare(ways)
        self.checks.append(OpCheck(op, layer, count, difference))
        return expected

    def _compare(self, ways: Sequence[tuple[str, Sequence[Tensor], Tensor, RowOp]]) -> tuple[int, OpDifference | None]:
        """Runs pieces in every way until one differs: rows compared, and the difference."""
        count = 0
        for variant, pieces, expected, run in ways:
            set_threads(self.model, self.rng.choice(self.threads))
            for rows in pieces:
                count += len(rows)
                difference = first_difference(expected[rows], run(rows), rows, variant)
                if difference is not None:
                    return count, difference
        return count, None

    def _variants(self) -> Iterator[tuple[str, list[Tensor]]]:
        n = len(self.all)
        yield "each row alone (M = 1)", list(self.all.split(1))
        cuts, start = [], 0
        while start < n:
            cuts.append(min(self.rng.choice((2, 3, 4, 7, 9, 17)), n - start))
            start += cuts[-1]
        yield "chunks of 2 to 17 rows", list(self.all.split(cuts))
        yield "all rows in reverse order", [self.all.flip(0)]
        many = [self.rng.randrange(n) for _ in range(_MANY)]
        yield f"among {_MANY} rows", [torch.tensor(many, device=self.model.device)]


def _bytes(x: Tensor) -> Tensor:
    """float8 as uint8, which torch can index; anything else as it is."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
