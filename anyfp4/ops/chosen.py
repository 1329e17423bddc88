"""Tokens that are chosen, but perhaps not known yet: a device may still be at work on them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError


class Chosen(Protocol):
    """A token for each of M rows of logits, which may be overwritten meanwhile.

    Attributes:
        tokens: int64 [M] on the device of the logits, to be used by what runs there next: each the token that
            :meth:`get` gives, or, where that gives none, any id of the vocabulary.
    """

    tokens: Tensor

    def get(self) -> list[int]:
        """Waits for these tokens, and for nothing that was launched after them.

        Returns:
            M token ids; −1 where the device could not choose, so that :meth:`Backend.sample` has to.

        Raises:
            InvalidArgumentError: a row is broken; see :func:`anyfp4.ops.sampling.sample`.
        """
        ...


class Known:
    """Tokens that the host chose."""

    def __init__(self, ids: list[int], device: torch.device, error: InvalidArgumentError | None = None) -> None:
        """Copies them to the device.

        Args:
            ids: M tokens.
            device: of the logits.
            error: what :meth:`get` is to raise; ``ids`` are of no meaning then.
        """
        self.tokens = torch.tensor(ids, dtype=torch.int64, device=device)
        self._ids, self._error = ids, error

    def get(self) -> list[int]:
        """See :meth:`Chosen.get`."""
        if self._error is not None:
            raise self._error
        return self._ids
