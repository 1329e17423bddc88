"""Files and index."""

from __future__ import annotations

from anyfp4.errors import CheckpointConfigError, CheckpointFileError, TensorError
from tests.checkpoint.damage.case import (
    LFS,
    MODEL,
    NORM,
    SHARD2,
    Case,
    cut,
    index,
    nothing,
    overwrite,
    second_copy,
    sharded,
)
from tests.checkpoint.small import UP

CASES = (
    # files
    Case("truncated body", nothing, CheckpointFileError, rf"{MODEL}: is truncated", after=cut(MODEL, lambda n: n - 5)),
    Case("truncated header", nothing, CheckpointFileError, rf"{MODEL}: is truncated", after=cut(MODEL, lambda n: 200)),
    Case(
        "longer than said",
        nothing,
        CheckpointFileError,
        rf"{MODEL}: .*longer",
        after=lambda f: (f / MODEL).write_bytes((f / MODEL).read_bytes() + b"xxxx"),
    ),
    Case("empty file", nothing, CheckpointFileError, rf"{MODEL}: is not a safetensors", after=overwrite(MODEL, b"")),
    Case(
        "garbage header",
        nothing,
        CheckpointFileError,
        rf"{MODEL}: is not a valid safetensors",
        after=overwrite(MODEL, (16).to_bytes(8, "little") + b"{garbage garbage" + bytes(64)),
    ),
    Case(
        "text file",
        nothing,
        CheckpointFileError,
        rf"{MODEL}: is not",
        after=overwrite(MODEL, b"<html>404 Not found</html>"),
    ),
    Case("LFS pointer", nothing, CheckpointFileError, rf"{MODEL}: is a Git LFS pointer", after=overwrite(MODEL, LFS)),
    Case(
        "flattened link",
        nothing,
        CheckpointFileError,
        rf"{MODEL}: is a text file that holds the path '../common/a.safetensors'",
        after=overwrite(MODEL, b"../common/a.safetensors"),
    ),
    Case(
        "config.json is a flattened link",
        nothing,
        CheckpointFileError,
        r"config.json: is a text file that holds the path",
        after=overwrite("config.json", b"../config.json\n"),
    ),
    Case(
        "dangling link",
        nothing,
        CheckpointFileError,
        rf"{MODEL}: is a link to nowhere",
        after=lambda f: ((f / MODEL).unlink(), (f / MODEL).symlink_to("nowhere")),
    ),
    Case(
        "no tensors at all",
        nothing,
        CheckpointFileError,
        r"has no .safetensors files \(it has .bin",
        after=lambda f: (f / MODEL).rename(f / "model.bin"),
    ),
    Case(
        "a numbered file is missing",
        sharded,
        CheckpointFileError,
        rf"{SHARD2}: does not exist, but model-00001",
        after=lambda f: ((f / SHARD2).unlink(), (f / f"{MODEL}.index.json").unlink()),
    ),
    # the index
    Case(
        "index names a missing file",
        sharded,
        CheckpointFileError,
        rf"{SHARD2}: does not exist, but .*index.json",
        after=lambda f: (f / SHARD2).unlink(),
    ),
    Case(
        "tensor not in its file",
        sharded,
        TensorError,
        rf"{SHARD2}: model.new.weight: is missing",
        after=index(lambda m: m.__setitem__("model.new.weight", SHARD2)),
    ),
    Case(
        "tensor in another file",
        sharded,
        TensorError,
        rf"{SHARD2}: {NORM}: is here, but .*model-00001",
        after=index(lambda m: m.__setitem__(NORM, "model-00001-of-00002.safetensors")),
    ),
    Case(
        "tensor not in the index",
        sharded,
        TensorError,
        r"embed_tokens.weight: is not listed in model.safetensors.index.json",
        after=index(lambda m: m.pop("model.embed_tokens.weight")),
    ),
    Case(
        "tensor in two files",
        sharded,
        TensorError,
        rf"{SHARD2}: {UP}.weight_packed: stands in model-00001",
        after=second_copy,
    ),
    Case(
        "path out of the folder",
        sharded,
        CheckpointConfigError,
        rf"index.json: {NORM}: is mapped to '../x.safetensors'",
        after=index(lambda m: m.__setitem__(NORM, "../x.safetensors")),
    ),
    Case(
        "absolute path",
        sharded,
        CheckpointConfigError,
        rf"index.json: {NORM}: is mapped to '/x.safetensors'",
        after=index(lambda m: m.__setitem__(NORM, "/x.safetensors")),
    ),
    Case(
        "pickle in the index",
        sharded,
        CheckpointConfigError,
        rf"{NORM}: is mapped to 'model.bin'",
        after=index(lambda m: m.__setitem__(NORM, "model.bin")),
    ),
    Case(
        "index without weight_map",
        sharded,
        CheckpointConfigError,
        r"index.json: weight_map must be",
        after=overwrite(f"{MODEL}.index.json", b"{}"),
    ),
    Case(
        "index is not JSON",
        sharded,
        CheckpointConfigError,
        r"index.json: is not valid JSON",
        after=overwrite(f"{MODEL}.index.json", b"{"),
    ),
)
