"""Ways to damage a checkpoint, each with the exception and the message that it must give."""

from __future__ import annotations

from tests.checkpoint.damage import ct_config, files, modelopt_config, tensors
from tests.checkpoint.damage.case import Case

CASES: tuple[Case, ...] = (*tensors.CASES, *files.CASES, *ct_config.CASES, *modelopt_config.CASES)
