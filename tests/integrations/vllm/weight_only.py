"""A real checkpoint without its activation scales: the same weights, weight-only, in the same layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def write_weight_only(source: Path, out: Path) -> Path:
    """Writes the checkpoint ``source`` to ``out`` with its layers declared and stored as weight-only."""
    out.mkdir()
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    quantization = config["quantization_config"]
    for group in quantization["config_groups"].values():
        group.pop("input_activations", None)
        if quantization["quant_method"] == "compressed-tensors":
            group["input_activations"] = None
    if quantization["quant_method"] == "modelopt":
        quantization["quant_algo"] = "W4A16_NVFP4"
    (out / "config.json").write_text(json.dumps(config))
    tensors = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    kept = {name: t for name, t in tensors.items() if not name.endswith((".input_scale", ".input_global_scale"))}
    assert len(kept) == len(tensors) - 7 * config["num_hidden_layers"]
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, out / name)
    return out
