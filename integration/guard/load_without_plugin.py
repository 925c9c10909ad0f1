"""Load a directory with stock transformers, in an environment without qalora-plugin.

PYTHON integration/guard/load_without_plugin.py MODEL_DIR [AutoClass] -> one line of JSON
"""

import importlib.util
import json
import sys

import transformers


def main() -> None:
    assert importlib.util.find_spec("qalora_plugin") is None, "this environment holds the plugin"
    auto = getattr(transformers, sys.argv[2] if len(sys.argv) > 2 else "AutoModelForCausalLM")
    result = {"transformers": transformers.__version__}
    try:
        auto.from_pretrained(sys.argv[1])
        result["raised"] = None
    except Exception as error:
        result["raised"] = f"{type(error).__name__}: {error}"[:2000]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
