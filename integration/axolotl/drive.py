"""Axolotl's verbs on variations of a small recipe, one after the other in a process.

    python drive.py RECIPE STOCK_GPTQ_BASE WORK_DIR [STEP...]      -> JSON, what each step left

Only what a subprocess has to show (launchers, kills, ranks) is elsewhere: importing Axolotl takes
longer than any of these runs. Nothing here is a stand-in; `max_new_tokens` alone is lowered.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import axolotl.cli.inference as inference
import torch
import yaml
from axolotl.cli import evaluate, merge_lora, preprocess, train
from axolotl.cli.config import load_cfg

from qalora_plugin import verify_merge


class Driver:
    """A small recipe, and variations of it."""

    def __init__(self, recipe, stock, work):
        self.recipe, self.stock, self.work = str(recipe), stock, work
        self.values = yaml.safe_load(recipe.read_text())

    def settings(self, name, **changes):
        """Return overrides of the recipe for a run in its own output_dir."""
        if "qalora" in changes:
            changes["qalora"] = self.values["qalora"] | changes["qalora"]
        return {"output_dir": str(self.work / name), **changes}

    def train(self, name, **changes):
        """Train, and return what the log and `verify` say."""
        train.do_cli(self.recipe, **self.settings(name, **changes))
        return self.result(name)

    def result(self, name):
        """Return the files of a run, the log of its last checkpoint, and the proof of its merge."""
        out = self.work / name
        found: dict[str, Any] = {"files": sorted(path.name for path in out.iterdir())}
        states = [path.parent for path in out.glob("checkpoint-*/trainer_state.json")]
        if states:
            last = max(states, key=step_of)
            found["log"] = json.loads((last / "trainer_state.json").read_text())["log_history"]
            found["rates"] = torch.load(last / "scheduler.pt", weights_only=True)["base_lrs"]
        if (out / "merged").is_dir():
            found["verified"] = verify_merge(out / "merged", out).as_dict()
        return found


def step_of(checkpoint):
    return int(checkpoint.name.rpartition("-")[2])


def refusal(verb):
    """Return the message with which a verb stops; nothing where it does not."""
    try:
        verb()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def bits2(driver):
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
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            merge_lora.do_cli(driver.recipe, **settings)
    except SystemExit as done:
        found["second_exit"], found["second_merge"] = done.code, said.getvalue()
    found["second_train"] = refusal(lambda: driver.train("bits2", qalora={"bits": 2}))
    merged = str(driver.work / "bits2" / "merged")
    found["merged_answer"] = ask(driver, settings | {"base_model": merged})
    return found


def ask(driver, settings):
    """Return what `axolotl inference` prints for one instruction on standard input."""
    config, printed = inference.GenerationConfig, io.StringIO()
    question = io.StringIO("### Task\nAdd two numbers.\nName: add\n### Answer\n")

    def short(**options):
        return config(**options | {"max_new_tokens": 4})

    with (
        mock.patch.object(inference, "GenerationConfig", short),
        mock.patch.object(sys, "stdin", question),
        contextlib.redirect_stdout(printed),
    ):
        inference.do_cli(driver.recipe, **settings)
    return printed.getvalue()


def packed(driver):
    """sample_packing, with reentrant gradient checkpointing."""
    return driver.train(
        "packed",
        sample_packing=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
        learning_rate=0.01,
        qalora={"merge_formats": ["qalora", "torchao", "lora"]},
    )


def stock(driver):
    """A GPTQ checkpoint (asymmetric, act-order) that GPTQModel wrote."""
    return driver.train("stock", base_model=str(driver.stock), sequence_len=64)


def mlx(driver):
    """A directory that MLX quantized, as it is; its file again at the end."""
    base = driver.stock.with_name("mlx_4bit_g32_bf16_mixed")
    block = {"merge_formats": ["qalora", "original"]}
    # a rate whose change is large beside the rounding of bf16 offsets
    values = {"base_model": str(base), "sequence_len": 64, "learning_rate": 0.05}
    return driver.train("mlx", qalora=block, **values)


def best(driver):
    """The best evaluation, here the first, lies between two saves; and what Axolotl would drop."""
    wanted = {"load_best_model_at_end": True, "eval_steps": 1, "save_steps": 2, "warmup_steps": 0}
    first = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    found = driver.train("best", **wanted, **first)
    out = driver.work / "best"
    found["proof"] = verify_merge(out / "merged", out / "checkpoint-1").as_dict()
    found["dropped"] = refusal(lambda: driver.train("none", **wanted | {"eval_steps": 3}))
    return found


def rows_of(driver, name, make):
    """Write a data set of what is made of the first rows' prompts and completions; its settings."""
    rows = Path(driver.values["datasets"][0]["path"]).read_text().splitlines()[:12]
    path = driver.work / f"{name}.jsonl"
    lines = [make(row["prompt"], row["completion"]) for row in map(json.loads, rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"path": str(path), "ds_type": "json", "split": "train"}


def fields(*parts):
    """Return a type of Axolotl's whose fields are used as they are."""
    formats = {f"{part}_format": f"{{{part}}}" for part in parts}
    return {f"field_{part}": part for part in parts} | formats


def preferences(driver, method, data, **settings):
    """Train ten steps by a method of TRL's: the trainer makes the adapter from a config."""
    block = {"quantize_method": "rtn"}
    values = {"rl": method, "max_steps": 10, "val_set_size": 0, "save_steps": 10}
    return driver.train(method, qalora=block, datasets=[data], **values | settings)


def dpo(driver):
    """Preferences, made of the first rows."""
    data = rows_of(driver, "dpo", lambda q, a: {"prompt": q, "chosen": a, "rejected": "pass\n"})
    return preferences(driver, "dpo", data | {"type": fields("prompt", "chosen", "rejected")})


def kto(driver):
    """Completions that are wanted, or not."""
    data = rows_of(
        driver, "kto", lambda q, a: {"prompt": q, "completion": a, "label": len(a) % 2 == 0}
    )
    kind = fields("prompt", "completion") | {"field_label": "label"}
    return preferences(driver, "kto", data | {"type": kind}, remove_unused_columns=False)


def orpo(driver):
    """Two conversations, without a reference."""

    def make(prompt, completion):
        asked = {"role": "user", "content": prompt}
        answers = {"chosen": completion, "rejected": "pass"}
        return {
            key: [asked, {"role": "assistant", "content": text}] for key, text in answers.items()
        }

    data = rows_of(driver, "orpo", make) | {"type": "chat_template.argilla"}
    return preferences(driver, "orpo", data, chat_template="chatml", remove_unused_columns=False)


REWARDS = """
def transform(cfg, *args, **kwargs):
    return lambda row, tokenizer=None: row


def spaces(completions, **kwargs):
    return [float(text.count(" ")) for text in completions]
"""


def grpo(driver):
    """Completions are drawn by the very layers that are trained, and rewarded by a function."""
    (driver.work / "drive_rewards.py").write_text(REWARDS)
    sys.path.insert(0, str(driver.work))
    data = rows_of(driver, "grpo", lambda q, a: {"prompt": q})
    trl = {"beta": 0.0, "use_vllm": False, "num_generations": 2, "max_completion_length": 8}
    trl |= {"reward_funcs": ["drive_rewards.spaces"]}
    return preferences(driver, "grpo", data | {"type": "drive_rewards.transform"}, trl=trl)


def reward(driver):
    """A reward model, whose head is trained whole; and a base that is changed while it loads."""
    data = rows_of(
        driver,
        "reward",
        lambda q, a: {"system": "", "input": q, "chosen": a, "rejected": "pass\n"},
    )
    data["type"] = "bradley_terry.chat_template"
    rtn = {"quantize_method": "rtn"}
    settings = {"reward_model": True, "chat_template": "llama3", "remove_unused_columns": False}
    settings |= {"sequence_len": 1024, "val_set_size": 0, "dataset_num_proc": 1}
    found = driver.train("reward", max_steps=10, datasets=[data], qalora=rtn, **settings)
    rope = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
    other = {"overrides_of_model_config": rope, "qalora": rtn}
    return found | {"changed": refusal(lambda: driver.train("changed", **other))}


def one_rank(driver):
    """What two ranks of FSDP2 have to reach."""
    return driver.train("one_rank", **json.loads((driver.work / "even.json").read_text()))


def resumed(driver):
    """The run of `killed` in this directory goes on, from its newest complete checkpoint."""
    out = driver.work / "killed"
    last = max(map(step_of, out.glob("checkpoint-*")))
    (out / "checkpoint-999").mkdir()  # killed while it saved: no trainer_state.json
    found = driver.train("killed", max_steps=last + 2, auto_resume_from_checkpoints=True)
    (out / "checkpoint-999").rmdir()
    second = str(out / "checkpoint-2")
    found["from_two"] = driver.train("from_two", max_steps=4, resume_from_checkpoint=second)
    return found | {"before": last}


WRONG = {
    "qalora.bitz": {"qalora": {"bitz": 4}},
    "qalora.bits": {"qalora": {"bits": 5}},
    "qalora.merge_formats": {"qalora": {"merge_formats": ["gptq"], "adapt": "zeros"}},
    "load_in_4bit": {"load_in_4bit": True},
    "fsdp": {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}},
    "peft_use_dora": {"peft_use_dora": True},
    "lora_qkv_kernel": {"lora_qkv_kernel": True},
    "adapter": {"adapter": "lora"},
    "base_model": {"base_model": "./no/such/directory"},
}


def refused(driver):
    """Configs that Axolotl must not load, or not train: their messages; no model is built."""
    found = {
        key: refusal(lambda c=changes: load_cfg(driver.recipe, **driver.settings("wrong", **c)))
        for key, changes in WRONG.items()
    }
    block = {"merge_formats": ["gptq"], "adapt": "scales"}
    found["qalora.zero_points"] = refusal(lambda: driver.train("wrong", qalora=block))
    return found


STEPS = {
    step.__name__: step
    for step in (
        refused,
        bits2,
        packed,
        stock,
        mlx,
        best,
        dpo,
        kto,
        orpo,
        grpo,
        reward,
        one_rank,
        resumed,
    )
}


def main():
    """Run all steps, or those that are named."""
    recipe, stock, work = (Path(argument).absolute() for argument in sys.argv[1:4])
    names = sys.argv[4:] or list(STEPS)
    sys.argv = sys.argv[:1]  # Axolotl's verbs parse it
    driver = Driver(recipe, stock, work)
    with contextlib.redirect_stdout(sys.stderr):
        results = {name: STEPS[name](driver) for name in names}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
