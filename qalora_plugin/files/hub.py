"""Find a model's directory: a local one, or a snapshot from the Hugging Face Hub."""

import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_HUB_PATTERNS = [
    "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*",
]  # fmt: skip


def hub_failures() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises where the Hub refuses, or cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # what connections raise comes from httpx, or from httpx2 with huggingface_hub 2
    bases: list[Any] = list(HfHubHTTPError.__mro__)
    http_error: type[Exception] = next(base for base in bases if base.__name__ == "HTTPError")
    # huggingface_hub 1.17 retries on a client that it has closed, a RuntimeError
    return (HfHubHTTPError, http_error, HFValidationError, OSError, RuntimeError)


def resolve_model_dir(name_or_path: str | Path, revision: str | None = None) -> Path:
    """Return the local directory of a model: the path itself, or a snapshot of a Hub repository.

    Only safetensors, JSON, tokenizer and licence files are downloaded, into the Hub's own cache.

    Args:
        name_or_path: a directory, or a Hub id such as `org/name`.
        revision: branch, tag or commit of the Hub repository.

    Raises:
        CheckpointError: neither a directory nor a repository that can be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    text = str(name_or_path)
    if path.exists() or isinstance(name_or_path, Path) or text.count("/") > 1 or text[:1] in "./~":
        what = "a file, not a directory" if path.exists() else "not a directory"
        raise CheckpointError(f"{name_or_path}: {what}. Give a model directory or Hub id.")
    # imported here: reading a local directory needs no network library
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=_HUB_PATTERNS))
    except hub_failures() as error:
        raise CheckpointError(
            f"{text}: no such directory, and the Hub did not give it "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]}). "
            "Check the name, or log in with `hf auth login` if the repository is private."
        ) from error


def locate(stored: str, directory: Path) -> str:
    """Return a model's name as it can be opened from here: a path that a file stores, or a Hub id.

    A relative path was written by a process in another directory, often one above the file's; and
    what was moved together lies side by side.

    Args:
        stored: what the file says.
        directory: where the file lies, such as an adapter's directory.
    """
    path, directory = Path(stored).expanduser(), directory.absolute()
    if path.exists():
        return stored
    places = [] if path.is_absolute() else [folder / path for folder in directory.parents]
    places.append(directory.parent / path.name)
    return str(next((place for place in places if place.exists()), stored))


def resolve_model_file(name: str | Path, revision: str | None = None) -> Path:
    """Return the local path of a model that is one file on the Hub: `org/name/path/of/file`.

    Raises:
        CheckpointError: neither a file here nor one that can be reached.
    """
    text = str(name)
    if isinstance(name, Path) or text.count("/") < 2 or text[:1] in "./~":
        raise CheckpointError(
            f"{name}: no such file. Give a path, or `org/name/file` for one on the Hub."
        )
    from huggingface_hub import hf_hub_download

    organisation, repository, file = text.split("/", 2)
    try:
        return Path(hf_hub_download(f"{organisation}/{repository}", file, revision=revision))
    except hub_failures() as error:
        raise CheckpointError(
            f"{text}: no such file, and the Hub did not give it "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]}). "
            "Check the name, or log in with `hf auth login` if the repository is private."
        ) from error


def public_name(name_or_path: Any) -> str:
    """Return a Hub id as it is, and of a path its last part: the rest is about the machine.

    A name of two parts is a path if there is such a directory now, as when a model is loaded.
    """
    text = str(name_or_path or "")
    if not text:
        return text
    is_path = os.path.isabs(text) or text.count("/") > 1 or text[0] in ".~" or os.path.isdir(text)
    return os.path.basename(os.path.abspath(text)) if is_path else text
