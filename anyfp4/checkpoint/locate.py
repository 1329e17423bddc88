"""From what a user calls a model, a folder or a Hugging Face id, to a folder on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from anyfp4.errors import CheckpointFileError, InvalidArgumentError

#: what is fetched of a repository; other weights (pytorch_model.bin, GGUF, ONNX) stay there
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate(model: str | Path, revision: str | None = None, say: Callable[[str], None] | None = None) -> Path:
    """The folder that holds a model's files; an id is fetched, or found in the Hugging Face cache.

    Args:
        model: a folder, or ``owner/name``.
        revision: branch, tag or commit of a repository; only with an id.
        say: told in one line what is fetched.

    Raises:
        InvalidArgumentError: neither a folder nor an id, or a revision of a folder.
        CheckpointFileError: the repository does not exist, is not accessible, or is not in the cache while offline.
    """
    if not str(model):
        raise InvalidArgumentError("the model's name is empty; give a folder or a Hugging Face id (owner/name)")
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise InvalidArgumentError(f"{path} is a folder; a revision belongs to a Hugging Face id")
        return path
    name = str(model)
    if path.exists():
        raise InvalidArgumentError(f"{path} is a file; give the folder that holds config.json")
    if name.startswith((".", "/", "~")):
        raise InvalidArgumentError(f"{path}: no such folder")
    if not _REPOSITORY.fullmatch(name):
        raise InvalidArgumentError(f"{name!r} is neither a folder on this machine nor a Hugging Face id (owner/name)")
    return _fetch(name, revision, say)


def _fetch(name: str, revision: str | None, say: Callable[[str], None] | None) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (slow to import)
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if say is not None:
        say(f"looking for {name} on the Hugging Face hub and in its cache")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except GatedRepoError as error:
        raise CheckpointFileError(f"{name} is gated: accept its terms, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise CheckpointFileError(f"{name}: no such folder here and no such repository on the hub") from error
    except RevisionNotFoundError as error:
        raise CheckpointFileError(f"{name}: no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointFileError(
            f"{name}: no such folder here, not in the Hugging Face cache, and the hub cannot be reached"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointFileError(f"{name}: the download failed: {error}") from error
