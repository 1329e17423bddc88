"""Reading a text through a decoder: windows, log-likelihoods, states after each layer (see docs/eval.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.layers.attention import LayerCache
from anyfp4.models.decoder import Decoder
from anyfp4.ops.attention import AttentionBatch

#: tokens that go through the layers at a time
_CHUNK = 512
_BLOCK = 16
#: logits held at a time; a comparison needs some ten times these bytes
_TILE_LOGITS = 2 << 20


def windows(count: int, context: int) -> list[range]:
    """``count`` tokens in windows of ``context``; a last window of one token predicts nothing and is left out."""
    return [range(i, min(i + context, count)) for i in range(0, count, context) if min(i + context, count) - i > 1]


class Reader:
    """Runs windows of text through a decoder, one at a time, over a cache of its own."""

    def __init__(self, model: Decoder, context: int) -> None:
        """Allocates the cache.

        Args:
            model: the decoder.
            context: most tokens of a window.

        Raises:
            InvalidArgumentError: the model has fewer positions.
        """
        limit = model.cos_sin.shape[0]
        if not 2 <= context <= limit:
            raise InvalidArgumentError(
                f"windows of {context} tokens: from 2 to the model's {limit} positions are possible"
            )
        self.model = model
        c = model.config
        self._blocks = -(-context // _BLOCK)
        shape = (self._blocks, _BLOCK, c.num_kv_heads, c.head_dim)

        def cache() -> Tensor:
            return torch.empty(shape, dtype=model.kv_dtype, device=model.device)

        self.caches = [LayerCache(cache(), cache()) for _ in model.blocks]

    def hidden(self, tokens: Sequence[int]) -> Tensor:
        """[T, hidden] after the last norm, of a window of T tokens."""
        parts = []
        for start in range(0, len(tokens), _CHUNK):
            ids, positions, batch = self._step(tokens[start : start + _CHUNK], start)
            with self.model.ops.quiet():
                parts.append(self.model.forward(ids, positions, self.caches, batch))
        return torch.cat(parts)

    def logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The logits of every row, a tile at a time: (rows, float32 [len(rows), vocab])."""
        step = max(1, _TILE_LOGITS // self.model.config.vocab_size)
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, min(start + step, hidden.shape[0]))
            with self.model.ops.quiet():
                tile = self.model.logits(hidden[rows])
            yield rows, tile

    def states(self, tokens: Sequence[int]) -> Iterator[Tensor]:
        """The residual stream [T, hidden] as it leaves the embedding, then each layer; T is at most a window."""
        model, eps = self.model, self.model.config.rms_norm_eps
        ids, positions, batch = self._step(tokens, 0)
        residual = model.embedding[ids]
        yield residual
        x = model.ops.rms_norm(residual, model.blocks[0].input_norm, eps)
        after = [block.input_norm for block in model.blocks[1:]] + [model.norm]
        for block, cache, norm in zip(model.blocks, self.caches, after, strict=True):
            x = block.attention(x, positions, model.cos_sin, cache, batch)
            x, residual = model.ops.add_rms_norm(x, residual, block.post_attention_norm, eps)
            # the next norm adds the MLP's output to the stream; its sum is what the model itself goes on with
            x, residual = model.ops.add_rms_norm(block.mlp(x), residual, norm, eps)
            yield residual

    def _step(self, tokens: Sequence[int], start: int) -> tuple[Tensor, Tensor, AttentionBatch]:
        device, end = self.model.device, start + len(tokens)
        positions = torch.arange(start, end, dtype=torch.int64, device=device)
        batch = AttentionBatch(
            query_start=torch.tensor([0, len(tokens)], dtype=torch.int32, device=device),
            context_len=torch.tensor([end], dtype=torch.int32, device=device),
            block_table=torch.arange(self._blocks, dtype=torch.int32, device=device).unsqueeze(0),
            slots=positions,
        )
        return torch.tensor(list(tokens), dtype=torch.int64, device=device), positions, batch


def token_losses(model: Decoder, logits: Tensor, targets: Sequence[int]) -> Tensor:
    """−log p of each target, natural logarithm: float32 [M] from float32 logits [M, vocab].

    Raises:
        InvalidArgumentError: there is a NaN among the logits.
    """
    logprobs = model.ops.log_softmax(logits)
    losses = -logprobs.gather(1, torch.tensor(list(targets), device=logits.device).unsqueeze(1)).squeeze(1)
    if bool(torch.isnan(losses).any()):
        raise InvalidArgumentError("the logits hold a NaN: the model or its input is broken")
    return losses


def divergence(reference: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
    """How far a model's next-token distributions lie from a reference's.

    Args:
        reference: float32 logits [M, vocab] of the reference, P.
        model: likewise of the model, Q.

    Returns:
        float64 [M], KL(P ‖ Q) = Σ P (ln P − ln Q) in nats; bool [M], whether both have the same most likely token.
    """
    p, q = (torch.log_softmax(x.to(torch.float64), dim=-1) for x in (reference, model))
    weight = p.exp()
    terms = torch.where(weight > 0, weight * (p - q), 0.0)
    return terms.sum(dim=-1), reference.argmax(dim=-1) == model.argmax(dim=-1)
