"""What belongs to a model directory beside its weights: tokenizer, chat template, licence, code."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.inside import check_regular, open_regular
from ..files.names import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    QUANTIZE_CONFIG_FILE,
    RECORD_FILE,
    REPORT_FILE,
    TOKENIZER_CONFIG_FILE,
)
from ..files.schemas import TokenizerConfig, read_as

_MORE_TEMPLATES = "additional_chat_templates/*.jinja"  # all but the default one
MODEL_FILES = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.py",
    "*.tiktoken",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    _MORE_TEMPLATES,
)
TOKENIZER_FILES = (
    _MORE_TEMPLATES,
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab.*",
)
_WRITTEN_ANEW = {
    ADAPTER_CONFIG_FILE,  # with one transformers would load that adapter, on its base
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    RECORD_FILE,
    REPORT_FILE,
    QUANTIZE_CONFIG_FILE,
}


def chat_templates(directory: Path) -> dict[str, str]:
    """Return a tokenizer's chat templates by name, as transformers reads them.

    The usual one is called "default".

    Files win over `chat_template` in tokenizer_config.json (`from_pretrained` of
    transformers/tokenization_utils_base.py).

    Raises:
        CheckpointError: a file leads out of the directory, or is no template.
    """
    files = {path.stem: path for path in sorted(directory.glob(_MORE_TEMPLATES))}
    default = directory / "chat_template.jinja"
    if default.is_file():
        files = {"default": default, **files}
    found = {name: _text(path, directory) for name, path in files.items()}
    settings = directory / TOKENIZER_CONFIG_FILE
    if found or not settings.is_file():
        return found
    stated = read_as(settings, TokenizerConfig).get("chat_template")
    if isinstance(stated, list):
        return {entry["name"]: entry["template"] for entry in stated}
    return {} if stated is None else {"default": stated}


def _text(path: Path, directory: Path) -> str:
    try:
        with open_regular(path, directory) as file:
            return file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: expected text in UTF-8, found other bytes ({error}). Copy it again."
        ) from error


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model directory, one of transformers.

    Raises:
        CheckpointError: there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # of every kind, by file and library
        what = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{directory}: expected a tokenizer beside the model, found none that transformers "
            f"reads ({type(error).__name__}: {what:.200}). Copy the tokenizer's files of the "
            "original model there"
        ) from error


def copy_side_files(source: Path, target: Path, patterns: Iterable[str] = MODEL_FILES) -> None:
    """Copy the files of `source` that match, but for those that say what its weights are.

    Raises:
        CheckpointError: one is a link that leads out of `source`, a pipe or a device.
    """
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            if path.is_dir() or path.name in _WRITTEN_ANEW:
                continue
            check_regular(path, source)
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
