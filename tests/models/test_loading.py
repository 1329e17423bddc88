"""Loading: every tensor goes to its device once, and no more than one layer is held beside what is kept."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyfp4.backends import registry
from anyfp4.backends.base import PreparedLinear
from anyfp4.backends.triton import TritonBackend
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.checkpoint.tensor_reader import TensorReader
from anyfp4.formats.weights import LinearWeight
from anyfp4.models import footprint
from anyfp4.models.loader import load_decoder
from tests.conftest import write_dense_model

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
#: weights repacked at a time here: about 50 KB on the way
PIECE = 1 << 14
#: norms, bytes
SMALL = 4096


@pytest.fixture(scope="module", params=["compressed-tensors", "modelopt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With layers that are large next to what repacking needs on the way."""
    from anyfp4.tools.quantize import quantize_checkpoint

    folder = tmp_path_factory.mktemp("loading")
    write_dense_model(folder / "dense", hidden_size=256, intermediate_size=1024, num_key_value_heads=4)
    return quantize_checkpoint(folder / "dense", folder / "nvfp4", layout=request.param).out


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are still alive; ``peak`` is the most after any operation.

    Tensors on the meta device stand for another device's and do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and not t.is_meta:
                storage = t.untyped_storage()
                self._storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        self._storages = {key: value for key, value in self._storages.items() if not value[0].expired()}
        return sum(nbytes for _, nbytes in self._storages.values())


def test_a_tensor_is_read_once_and_onto_its_device(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, torch.device | None]] = []
    plain = TensorReader.read

    def watched(self: TensorReader, name: str, device: torch.device | None = None) -> torch.Tensor:
        read.append((name, device))
        return plain(self, name, device)

    monkeypatch.setattr(TensorReader, "read", watched)
    with Checkpoint(model) as checkpoint:
        load_decoder(checkpoint, device=CPU)
        assert sorted(name for name, _ in read) == sorted(checkpoint.names)
        # what is checked on the host is a twelfth of the bytes or less: scales
        assert all(device in (CPU, None) for _, device in read)
        by_host = [name for name, device in read if device is None]
        assert {name.rsplit(".", 1)[1] for name in by_host} <= {
            *("weight_scale", "weight_global_scale", "input_global_scale", "weight_scale_2", "input_scale")
        }
        assert sum(checkpoint.info(name).nbytes for name in by_host) < checkpoint.total_bytes / 8


def test_reading_onto_another_device_takes_no_copy_on_the_host(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyfp4.checkpoint import tensor_reader

    monkeypatch.setattr(tensor_reader, "_MAPPED_BYTES", 1000)
    with Checkpoint(model) as checkpoint, warnings.catch_warnings(), LiveBytes() as live:
        warnings.simplefilter("error")
        for name in sorted(checkpoint.names):
            info = checkpoint.info(name)
            tensor = checkpoint._reader.read(name, torch.device("meta"))
            assert (tensor.shape, tensor.dtype, tensor.device.type) == (info.shape, info.dtype, "meta")
        assert live.peak <= 1000  # the file's own pages, a piece at a time


@needs_triton
@pytest.mark.parametrize("numerics", ["native", "blackwell"])
def test_no_more_than_one_layer_is_held_twice(model: Path, numerics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyfp4.kernels.triton import layout, workspace

    workspace.reserve(CPU)  # once for a device, and not of a layer
    live = LiveBytes()
    kept = [261 * 256 * 2]  # after each layer: what stays; before the first, the embedding

    class Watched(TritonBackend):
        """The Triton backend's preparation is plain torch code and runs on a CPU."""

        def why_not(self, *_: Any, **__: Any) -> None:
            return None

        def prepare(self, weight: LinearWeight, numerics: str = "native") -> PreparedLinear:
            before, live.peak = live.now, 0
            assert before <= kept[-1] + weight.nbytes + SMALL  # nothing else as the file holds it
            prepared = super().prepare(weight, numerics)
            assert live.peak <= before + prepared.nbytes + 4 * PIECE
            kept.append(kept[-1] + prepared.nbytes)
            return prepared

    monkeypatch.setattr(layout, "PIECE", PIECE)
    monkeypatch.setitem(registry.PREFERENCE, "cpu", (Watched(),))
    monkeypatch.setattr(footprint, "measure", lambda *_: footprint.Footprint({}, 0))  # it prepares samples
    with Checkpoint(model) as checkpoint, live:
        decoder = load_decoder(checkpoint, device=CPU, numerics=numerics)
        assert len(kept) == 1 + 4 * 2 + 1 and kept[-1] == decoder.nbytes
        assert live.now <= decoder.nbytes + decoder.cos_sin.nbytes + SMALL


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_peak_on_a_gpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyfp4.kernels.triton import layout

    monkeypatch.setattr(layout, "PIECE", PIECE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with Checkpoint(model) as checkpoint:
        decoder = load_decoder(checkpoint, device=torch.device("cuda", 0), backend="triton")
    peak, final = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    largest = 2 * decoder.config.intermediate_size * decoder.config.hidden_size * 9 // 16  # gate and up, as stored
    print(f"peak {peak:,}, final {final:,}, largest layer {largest:,} bytes")
    assert peak <= final + largest
