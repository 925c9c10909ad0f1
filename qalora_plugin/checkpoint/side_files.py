"""What belongs to a model directory beside its weights: tokenizer, chat template, licence, code."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from ..files.names import (
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    QUANTIZE_CONFIG_FILE,
    RECORD_FILE,
    REPORT_FILE,
)

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
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    RECORD_FILE,
    REPORT_FILE,
    QUANTIZE_CONFIG_FILE,
}


def copy_side_files(source: Path, target: Path, patterns: Iterable[str] = MODEL_FILES) -> None:
    """Copy the files of `source` that match, but for those that say what its weights are."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name not in _WRITTEN_ANEW:
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
