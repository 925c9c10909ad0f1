"""Validate recipes with Axolotl's own code, as on a GPU, and print the results as JSON.

    validate_recipes.py FILE...

Each file is validated as it is and with both DeepSpeed configurations, and so is the config of its
adapter. Nothing is downloaded, and no model of the Hub is looked at.
"""

import json
import sys
from pathlib import Path

import yaml
from axolotl.cli.config import plugin_set_cfg, prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from qalora_plugin.axolotl.plugin import adapter_config

GPU = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}


def validate(path, deepspeed):
    """Return what Axolotl makes of one recipe.

    Raises:
        Exception: whatever Axolotl or the plugin refuses the recipe with.
    """
    cfg = DictDefault(yaml.safe_load(Path(path).read_text()))
    if deepspeed:
        cfg.deepspeed = deepspeed
    prepare_plugins(cfg)
    cfg = validate_config(
        cfg,
        capabilities={**GPU, "n_gpu": 2 if deepspeed else 1},
        env_capabilities={"torch_version": "2.13.0"},
    )
    plugin_set_cfg(cfg)
    config = adapter_config(cfg)
    return {"qalora": dict(cfg.qalora), "r": config.r, "lora_dropout": config.lora_dropout}


if __name__ == "__main__":
    found = {}
    for name in sys.argv[1:]:
        for zero in (None, "recipes/deepspeed/zero2.json", "recipes/deepspeed/zero3.json"):
            try:
                result = validate(name, zero)
            except Exception as error:  # the test shows every recipe that fails
                result = {"error": f"{type(error).__name__}: {error}"}
            found[f"{name} {zero or ''}".strip()] = result
    print(json.dumps(found))
