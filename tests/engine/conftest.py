"""The tiny model's decoder, without tokenizer and engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.models.decoder import Decoder
from anyfp4.models.loader import load_decoder


@pytest.fixture(scope="session")
def decoder(tiny_model: Path) -> Decoder:
    with Checkpoint(tiny_model) as checkpoint:
        return load_decoder(checkpoint, device=torch.device("cpu"))
