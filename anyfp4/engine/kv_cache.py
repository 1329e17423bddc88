"""The paged KV cache: its size, and the tensors of each layer."""

from __future__ import annotations

import torch

from anyfp4 import device as devices
from anyfp4.engine.config import EngineConfig
from anyfp4.engine.graphs import MOST_TOKENS
from anyfp4.engine.model_runner import LOGITS_TILE
from anyfp4.errors import InsufficientMemoryError, InvalidArgumentError
from anyfp4.layers.attention import LayerCache
from anyfp4.models.config import DecoderConfig
from anyfp4.models.decoder import Decoder

#: part of a machine's memory that the cache takes at most on a CPU, unless told otherwise
_CPU_SHARE = 0.25
#: room for a few blocks of any model, for an engine that is made and not used
UNUSED_BYTES = 64 << 20


def block_bytes(model: Decoder, block_size: int) -> int:
    """Bytes of one block over all layers."""
    return _block_bytes(model.config, model.kv_dtype, block_size)


def _block_bytes(shape: DecoderConfig, dtype: torch.dtype, block_size: int) -> int:
    return 2 * shape.num_layers * block_size * shape.num_kv_heads * shape.head_dim * dtype.itemsize


def needed(config: EngineConfig, shape: DecoderConfig, dtype: torch.dtype) -> dict[str, int]:
    """What an engine needs beside the weights, bytes by what they are for.

    Args:
        config: the engine's.
        shape: the model's.
        dtype: of the KV cache.
    """
    if config.kv_cache_bytes is not None:
        cache = ("KV cache (kv_cache_bytes)", config.kv_cache_bytes)
    else:
        one = _block_bytes(shape, dtype, config.block_size)
        cache = (f"KV cache, at least one block of {config.block_size} tokens", one)
    return {
        f"activations of {config.max_step_tokens} tokens (max_step_tokens)": activation_bytes(config, shape),
        cache[0]: cache[1],
    }


def activation_bytes(config: EngineConfig, shape: DecoderConfig) -> int:
    """An estimate from above of what a step's tensors take at their peak.

    In the widest op of a layer, per token: the residual stream, what is added to it, the norm of their sum and its
    quantization (4 × hidden), and an op's input and output with their quantization: q/k/v, rotated, attended to; or
    gate and up, and their product. After the layers: the logits of a tile of rows (in a CUDA graph, of a row for each
    sequence), their log-probabilities, and a copy.
    """
    attention = 3 * (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    width = 4 * shape.hidden_size + max(attention, 4 * shape.intermediate_size)
    rows = min(max(LOGITS_TILE, min(config.max_num_seqs, MOST_TOKENS)), config.max_step_tokens)
    logits = 3 * rows * shape.vocab_size * torch.float32.itemsize
    return config.max_step_tokens * width * shape.dtype.itemsize + logits


def num_blocks(model: Decoder, config: EngineConfig, max_model_len: int) -> int:
    """How many blocks the cache has; to be asked when the weights are loaded.

    Raises:
        InvalidArgumentError: ``kv_cache_bytes`` has no room for a block.
        InsufficientMemoryError: what is left has none.
    """
    size = block_bytes(model, config.block_size)
    if config.kv_cache_bytes is not None:
        if config.kv_cache_bytes < size:
            raise InvalidArgumentError(f"kv_cache_bytes = {config.kv_cache_bytes}: one block needs {size} bytes")
        return config.kv_cache_bytes // size
    if model.device.type == "cpu" and config.memory_fraction is None:
        left = int(devices.memory(model.device).total * _CPU_SHARE)
    else:
        left = devices.budget(model.device, config.memory_fraction)
        left -= activation_bytes(config, model.config) + model.workspace
    if left < size:
        raise InsufficientMemoryError(
            f"the KV cache finds {devices.size(max(0, left))} left on {model.device}, and one block of "
            f"{config.block_size} tokens needs {devices.size(size)}: raise memory_fraction, or lower max_step_tokens",
            parts={"KV cache": size},
            available=max(0, left),
        )
    return min(config.max_num_seqs * -(-max_model_len // config.block_size), left // size)


def allocate(model: Decoder, blocks: int, block_size: int) -> list[LayerCache]:
    """The cache tensors of every layer; the pages of a CPU's memory are taken as they are first written."""
    c = model.config
    shape = (blocks, block_size, c.num_kv_heads, c.head_dim)

    def one() -> torch.Tensor:
        return torch.empty(shape, dtype=model.kv_dtype, device=model.device)

    return [LayerCache(one(), one()) for _ in range(c.num_layers)]
