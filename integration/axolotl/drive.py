"""Axolotl's verbs on small variations of the quickstart recipe, one after the other in a process.

    python drive.py PROJECT_ROOT STOCK_GPTQ_BASE WORK_DIR      -> JSON, what each step left

Only what a subprocess has to show (launchers, kills, ranks) is elsewhere: importing Axolotl takes
longer than any of these runs. Nothing here is a stand-in; `max_new_tokens` alone is lowered.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import axolotl.cli.inference as inference
from axolotl.cli import evaluate, merge_lora, preprocess, train
from axolotl.cli.config import load_cfg

from qalora_plugin import verify_merge

ROWS = 48


class Driver:
    """The quickstart recipe, made small."""

    def __init__(self, root: Path, stock: Path, work: Path) -> None:
        self.recipe, self.stock = str(root / "recipes" / "quickstart.yaml"), stock
        self.work = work
        lines = (root / "recipes/quickstart/pairs.jsonl").read_text().splitlines()[:ROWS]
        self.pairs = work / "pairs.jsonl"
        self.pairs.write_text("\n".join(lines) + "\n")
        self.preferences = work / "preferences.jsonl"
        rows = [json.loads(line) for line in lines[:12]]
        self.preferences.write_text(
            "\n".join(
                json.dumps(
                    {"prompt": r["prompt"], "chosen": r["completion"], "rejected": "pass\n"}
                )
                for r in rows
            )
        )

    def settings(self, name: str, **changes: Any) -> dict[str, Any]:
        """Overrides of the recipe for a run in its own output_dir."""
        block = {
            "group_size": 32,
            "calibration_samples": 4,
            "quantized_model_dir": str(self.work / "bases"),
        }
        completion = {"field_instruction": "prompt", "field_output": "completion"}
        return {
            "datasets": [
                {
                    "path": str(self.pairs),
                    "ds_type": "json",
                    "type": {**completion, "format": "{instruction}"},
                }
            ],
            "dataset_prepared_path": str(self.work / "prepared"),
            "output_dir": str(self.work / name),
            "sequence_len": 256,
            "micro_batch_size": 2,
            "max_steps": 3,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            **changes,
            "qalora": block | changes.get("qalora", {}),
        }

    def train(self, name: str, **changes: Any) -> dict[str, Any]:
        """Train; what the log and `verify` say."""
        train.do_cli(self.recipe, **self.settings(name, **changes))
        return self.result(name)

    def result(self, name: str) -> dict[str, Any]:
        """Of a run that is over."""
        out = self.work / name
        found: dict[str, Any] = {"files": sorted(path.name for path in out.iterdir())}
        states = sorted(
            out.glob("checkpoint-*/trainer_state.json"),
            key=lambda path: int(path.parent.name.rpartition("-")[2]),
        )
        if states:
            found["log"] = json.loads(states[-1].read_text())["log_history"]
        if (out / "merged").is_dir():
            found["verified"] = verify_merge(out / "merged", out).as_dict()
        return found


def refusal(verb: Callable[[], Any]) -> str:
    """The message with which a verb stops; empty where it does not."""
    try:
        verb()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def bits2(driver: Driver) -> dict[str, Any]:
    """preprocess, train without merging, evaluate, inference, merge-lora, and merge-lora again."""
    block = {"bits": 2, "adapt": "both", "merge_on_finish": False}
    settings = driver.settings("bits2", qalora=block)
    preprocess.do_cli(driver.recipe, **settings)
    found = {"prepared": len(list((driver.work / "prepared").rglob("*.arrow")))}
    found |= driver.train("bits2", qalora=block)
    adapter = settings["output_dir"]
    found["no_base"] = refusal(lambda: evaluate.do_cli(driver.recipe, **settings))
    evaluate.do_cli(driver.recipe, **settings, lora_model_dir=adapter)
    found["evaluated"] = (driver.work / "bits2" / "eval_summary.csv").read_text()
    found["answer"] = ask(driver, settings | {"lora_model_dir": adapter})
    try:
        merge_lora.do_cli(driver.recipe, **settings)
    except SystemExit as done:
        found["merge_exit"] = done.code
    found |= driver.result("bits2")
    found["second_merge"] = refusal(lambda: merge_lora.do_cli(driver.recipe, **settings))
    found["second_train"] = refusal(lambda: driver.train("bits2", qalora={"bits": 2}))
    merged = str(driver.work / "bits2" / "merged")
    found["merged_answer"] = ask(driver, settings | {"base_model": merged})
    return found


def ask(driver: Driver, settings: dict[str, Any]) -> str:
    """What `axolotl inference` prints for one instruction on standard input."""
    config = inference.GenerationConfig
    printed, stdin = io.StringIO(), sys.stdin
    try:
        inference.GenerationConfig = lambda **kw: config(**kw | {"max_new_tokens": 4})
        sys.stdin = io.StringIO("### Task\nAdd two numbers.\nName: add\n### Answer\n")
        with contextlib.redirect_stdout(printed):
            inference.do_cli(driver.recipe, **settings)
    finally:
        inference.GenerationConfig, sys.stdin = config, stdin
    return printed.getvalue()


def packed(driver: Driver) -> dict[str, Any]:
    """sample_packing, with reentrant gradient checkpointing."""
    return driver.train(
        "packed",
        sample_packing=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
        learning_rate=0.01,
    )


def stock(driver: Driver) -> dict[str, Any]:
    """A GPTQ checkpoint (asymmetric, act-order) that GPTQModel wrote."""
    return driver.train("stock", base_model=str(driver.stock))


def dpo(driver: Driver) -> dict[str, Any]:
    """Preferences: the trainer makes the adapter from a config."""
    return driver.train(
        "dpo",
        rl="dpo",
        max_steps=2,
        val_set_size=0,
        datasets=[
            {
                "path": str(driver.preferences),
                "ds_type": "json",
                "split": "train",
                "type": {
                    "field_prompt": "prompt",
                    "field_chosen": "chosen",
                    "field_rejected": "rejected",
                    "prompt_format": "{prompt}",
                    "chosen_format": "{chosen}",
                    "rejected_format": "{rejected}",
                },
            }
        ],
    )


def resumed(driver: Driver) -> dict[str, Any]:
    """The run of `killed` in this directory goes on, from its newest complete checkpoint."""
    torn = driver.work / "killed" / "checkpoint-99"
    torn.mkdir()  # killed while it saved: no trainer_state.json
    before = sorted(path.name for path in (driver.work / "killed").glob("checkpoint-*"))
    found = driver.train("killed", max_steps=8, auto_resume_from_checkpoints=True)
    first = driver.work / "killed" / "checkpoint-2"
    again = driver.train("from_two", max_steps=3, resume_from_checkpoint=str(first))
    return found | {"before": before, "from_two": again}


WRONG = {
    "qalora.bitz": {"qalora": {"bitz": 4}},
    "qalora.bits": {"qalora": {"bits": 5}},
    "load_in_4bit": {"load_in_4bit": True},
    "fsdp": {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}},
    "peft_use_dora": {"peft_use_dora": True},
    "lora_qkv_kernel": {"lora_qkv_kernel": True},
    "adapter": {"adapter": "lora"},
    "base_model": {"base_model": "./no/such/directory"},
}


def refused(driver: Driver) -> dict[str, str]:
    """Messages of configs that Axolotl must not load; loading one builds no model."""
    return {
        key: refusal(lambda c=changes: load_cfg(driver.recipe, **driver.settings("wrong", **c)))
        for key, changes in WRONG.items()
    }


STEPS = {step.__name__: step for step in (refused, bits2, packed, stock, dpo, resumed)}


def main() -> None:
    """Run all steps, or those that are named."""
    root, stock_base, work = (Path(argument).absolute() for argument in sys.argv[1:4])
    names = sys.argv[4:] or list(STEPS)
    sys.argv = sys.argv[:1]  # Axolotl's verbs parse it
    driver = Driver(root, stock_base, work)
    results = {}
    for name in names:
        with contextlib.redirect_stdout(sys.stderr):
            results[name] = STEPS[name](driver)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
