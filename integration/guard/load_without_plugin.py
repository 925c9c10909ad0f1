"""Load a directory with stock transformers, in an environment without qalora-plugin.

PYTHON integration/guard/load_without_plugin.py MODEL_DIR AUTO_CLASS -> one line of JSON
"""

import importlib.util
import json
import sys

import transformers

if __name__ == "__main__":
    assert importlib.util.find_spec("qalora_plugin") is None, "this environment holds the plugin"
    raised = None
    try:
        getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"[:2000]
    print(json.dumps({"transformers": transformers.__version__, "raised": raised}))
