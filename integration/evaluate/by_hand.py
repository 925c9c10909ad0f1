"""Run tasks by lm-evaluation-harness itself, in the environment that has it.

    PYTHON integration/evaluate/by_hand.py FOLDER TASKS MODEL_ARGS...

Prints {MODEL_ARGS: {task: {metric: value}}} as JSON. MODEL_ARGS are those of `lm_eval --model hf`.
"""

import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager

import qalora_plugin

qalora_plugin.register()
folder, tasks, *models = sys.argv[1:]
found = {
    arguments: lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=tasks.split(","),
        batch_size=4,
        device="cpu",
        task_manager=TaskManager(include_path=folder),
        log_samples=False,
    )["results"]
    for arguments in models
}
print(json.dumps(found, default=str))
