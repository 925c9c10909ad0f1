"""Copy what belongs to a model beside its weights: tokenizer, generation config, templates."""

import shutil
from pathlib import Path

from .manifest import MANIFEST_FILE
from .reader import CONFIG_FILE, INDEX_FILE
from .stock_gptq import QUANTIZE_CONFIG_FILE

_PATTERNS = ("*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*")
_REWRITTEN = {CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, QUANTIZE_CONFIG_FILE}


def copy_side_files(source: Path, target: Path) -> None:
    """Copy the files at the top of `source` that are neither weights nor describe them."""
    for pattern in _PATTERNS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name not in _REWRITTEN:
                shutil.copyfile(path, target / path.name)
