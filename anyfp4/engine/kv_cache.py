"""The paged KV cache: its size, and the tensors of each layer."""

from __future__ import annotations

import torch

from anyfp4.device import total_memory
from anyfp4.engine.config import EngineConfig
from anyfp4.errors import InvalidArgumentError
from anyfp4.layers.attention import LayerCache
from anyfp4.models.decoder import Decoder

#: part of the machine's memory that the cache takes at most, unless told otherwise
_MEMORY_SHARE = 0.25


def block_bytes(model: Decoder, block_size: int) -> int:
    """Bytes of one block over all layers."""
    c = model.config
    return 2 * c.num_layers * block_size * c.num_kv_heads * c.head_dim * model.kv_dtype.itemsize


def num_blocks(model: Decoder, config: EngineConfig, max_model_len: int) -> int:
    """How many blocks the cache has.

    Raises:
        InvalidArgumentError: not even one block fits.
    """
    size = block_bytes(model, config.block_size)
    wanted = config.max_num_seqs * -(-max_model_len // config.block_size)
    if config.kv_cache_bytes is not None:
        count = config.kv_cache_bytes // size
    else:
        count = min(wanted, int(total_memory(model.device) * _MEMORY_SHARE) // size)
    if count < 1:
        raise InvalidArgumentError(f"kv_cache_bytes = {config.kv_cache_bytes}: one block needs {size} bytes")
    return count


def allocate(model: Decoder, blocks: int, block_size: int) -> list[LayerCache]:
    """The cache tensors of every layer; the pages of a CPU's memory are taken as they are first written."""
    c = model.config
    shape = (blocks, block_size, c.num_kv_heads, c.head_dim)

    def one() -> torch.Tensor:
        return torch.empty(shape, dtype=model.kv_dtype, device=model.device)

    return [LayerCache(one(), one()) for _ in range(c.num_layers)]
