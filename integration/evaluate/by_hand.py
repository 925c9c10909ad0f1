"""Run tasks by lm-evaluation-harness itself, in the environment that has it.

    PYTHON integration/evaluate/by_hand.py MODEL_ARGS FOLDER TASK...

Prints {task: {metric: value}} as JSON. MODEL_ARGS are those of `lm_eval --model hf`.
"""

import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager

import qalora_plugin

qalora_plugin.register()
arguments, folder, *tasks = sys.argv[1:]
found = lm_eval.simple_evaluate(
    model="hf",
    model_args=arguments,
    tasks=tasks,
    batch_size=4,
    device="cpu",
    task_manager=TaskManager(include_path=folder),
    log_samples=False,
)
print(json.dumps(found["results"], default=str))
