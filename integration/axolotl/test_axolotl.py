"""`adapter: qalora` in the real Axolotl, from a recipe to a verified merged checkpoint."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qalora_plugin import verify_merge
from qalora_plugin.tuner.parameter_groups import SCALE_LR_RATIO

Axolotl = Any  # the fixture's class, in conftest.py
Driven = dict[str, Any]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def check_merged(result, layers):
    """Check that it is merged, proved by `verify`, and not the base again."""
    verified = result["verified"]
    assert verified["layers"] == layers
    assert verified["integers_equal"]
    assert verified["hashes"]
    assert verified["max_difference"] == 0.0
    assert verified["output_change"] > 2 * verified["output_error"]


def losses(log):
    return [row for row in log if "loss" in row]


def test_quickstart_through_the_command_line(axolotl, work):
    """The recipe as it is, through the default launcher: loss falls, `qalora verify` proves it."""
    out = work / "quickstart"
    command = ["axolotl", "train", "recipes/quickstart.yaml", "--output-dir", out]
    found = re.findall(r"{'loss': '([^']+)'", axolotl.run("quickstart", *command))
    values = [float(value) for value in found]
    assert len(values) == 12  # 60 steps, a row every 5
    assert sum(values[-3:]) < 0.97 * sum(values[:3])
    assert axolotl.verify(out)["layers"] == 28


def test_lm_eval_takes_an_export_and_stops_on_the_rest(axolotl, work, driven):
    """`axolotl lm-eval` loads its model in a process without this package: never half a model."""
    script = (
        "import sys; from transformers import AutoModelForCausalLM as M\n"
        "for path in sys.argv[1:]:\n"
        "    try: M.from_pretrained(path)\n"
        "    except Exception as error: print('stopped', type(error).__name__)\n"
        "    else: print('loaded')"
    )
    out = work / "packed"
    folders = (out, out / "merged", out / "merged-torchao")
    printed = axolotl.run("plain", axolotl.python, "-c", script, *folders)
    said = [line.split()[0] for line in printed.splitlines() if line[:7] in ("stopped", "loaded")]
    assert said == ["stopped", "stopped", "loaded"]


def test_preprocess_and_two_bits(driven):
    found = driven["bits2"]
    assert found["prepared"] > 0
    check_merged(found, layers=28)


def test_evaluate_and_inference(driven):
    """On the adapter, and on the merged directory; without either they say what to do."""
    found = driven["bits2"]
    rows = dict(row.split(",", 1) for row in found["evaluated"].splitlines())
    train, validation = map(float, rows["loss"].split(","))
    assert 1 < train < 5
    assert 1 < validation < 5
    assert "### Answer" in found["answer"]
    assert "### Answer" in found["merged_answer"]
    assert "lora_model_dir" in found["no_base"]


def test_merge_lora_merges_or_says_that_training_has_merged(driven):
    found = driven["bits2"]
    assert found["merge_exit"] == 0
    assert found["second_exit"] == 0
    assert "merged this adapter already" in found["second_merge"]
    assert "earlier run" in found["second_train"]


def test_sample_packing_and_gradient_checkpointing(driven):
    check_merged(driven["packed"], layers=28)


def test_merge_formats(driven):
    assert {"merged", "merged-torchao", "merged-lora"} <= set(driven["packed"]["files"])


def test_stock_gptq_base(driven):
    check_merged(driven["stock"], layers=14)


def test_mlx_base_and_its_file_again(driven, work):
    check_merged(driven["mlx"], layers=6)
    written = work / "mlx" / "merged-original"
    base = ROOT / "tests" / "fixtures" / "mlx_4bit_g32_bf16_mixed"
    before, after = (load_file(folder / "model.safetensors") for folder in (base, written))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and {name.rpartition(".")[2] for name in changed} == {"biases"}


def test_the_best_adapter_is_merged_or_refused(driven):
    """It is saved though it lies between two saves; where Axolotl drops the wish, it says so."""
    found = driven["best"]
    assert found["proof"]["max_difference"] == 0.0
    rows = [row["eval_loss"] for row in found["log"] if row.get("eval_loss") and row["step"]]
    assert rows[0] == max(rows) > min(rows)
    assert "Axolotl has dropped it" in found["dropped"]


@pytest.mark.parametrize(
    ("method", "logged"),
    [
        ("dpo", "rewards/margins"),
        ("kto", "rewards/chosen"),
        ("orpo", "log_odds_ratio"),
        ("grpo", "rewards/spaces/mean"),
    ],
)
def test_preferences(driven, method, logged):
    found = driven[method]
    check_merged(found, layers=28)
    assert "model.safetensors" not in found["files"]
    assert max(row["step"] for row in found["log"]) == 10
    assert any(logged in row for row in found["log"]), found["log"]


def test_a_reward_models_head_is_merged(driven):
    """Rows may be longer than max_position_embeddings, which Axolotl raises then."""
    assert driven["reward"]["verified"]["modules_to_save"] == 1


def test_a_base_that_differs_from_its_files_is_refused(driven):
    changed = driven["reward"]["changed"]
    assert "rope_parameters.factor of the model's config is not as in" in changed


def test_resume_after_sigkill(driven):
    """From the newest complete checkpoint, and from one that is named."""
    found = driven["resumed"]
    for run, last in ((found, found["before"] + 2), (found["from_two"], 4)):
        assert [row["step"] for row in losses(run["log"])] == list(range(1, last + 1))
        check_merged(run, layers=28)


def test_the_scales_train_at_their_own_rate(driven):
    """`adapt: both`: two parameter groups. `zeros`: one."""
    rate, of_scales = driven["bits2"]["rates"]
    assert of_scales == pytest.approx(SCALE_LR_RATIO * rate)
    assert len(set(driven["stock"]["rates"])) == 1


def test_our_figures_are_logged(driven):
    rows = losses(driven["bits2"]["log"])
    changes = [row["qalora/offset_change"] for row in rows]
    assert changes[0] == 0  # the rate warms up from 0
    assert 0 < changes[1] < changes[2]
    assert 0 < rows[2]["qalora/offset_change"] <= rows[2]["qalora/offset_change_max"]
    assert rows[2]["qalora/scale_change"] > 0


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("qalora.bitz", "group_size"),
        ("qalora.bits", "2, 3, 4, 8 or 'auto'"),
        ("qalora.merge_formats", "Set adapt: scales"),
        ("qalora.zero_points", "set zero_points: integer"),
        ("load_in_4bit", "remove it"),
        ("fsdp", "fsdp_version: 2"),
        ("peft_use_dora", "remove it"),
        ("lora_qkv_kernel", "remove it"),
        ("adapter", "adapter: qalora"),
        ("base_model", "model directory or Hub id"),
    ],
)
def test_wrong_configs_are_refused(driven, key, allowed):
    """While the config loads, before any model: the key, and what is allowed."""
    message = driven["refused"][key]
    assert key.rpartition(".")[2] in message
    assert allowed in message


@pytest.fixture(scope="session")
def ranks(axolotl, work, small, even):
    """The folder of what two ranks trained: DDP and ZeRO-3 on one base, and FSDP2."""
    folder = work / "ranks"
    sharding = {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "SHARDED_STATE_DICT",
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": False,
    }
    fsdp2 = even | {"micro_batch_size": 2, "fsdp_version": 2, "fsdp_config": sharding}
    zero3 = {"max_steps": 2, "deepspeed": "recipes/deepspeed/zero3.json"}
    runs = {"ddp": {"max_steps": 2}, "zero3": zero3, "fsdp2": fsdp2}
    settings = [values | {"output_dir": str(folder / name)} for name, values in runs.items()]
    axolotl.run("ranks", axolotl.python, HERE / "two_ranks.py", small, json.dumps(settings))
    return folder


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_two_ranks(ranks, mode):
    """One quantized base, for both runs, and one merged directory each."""
    out = ranks / mode
    bases = [path for path in (ranks / "quantized_bases").iterdir() if path.is_dir()]
    assert len(bases) == 1
    assert sorted(path.name for path in out.glob("*merged*")) == ["merged"]
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["qalora/offset_change"] > 0
    assert state["epoch"] > 0.15  # of 43 rows, two steps of two rows on each of two ranks
    assert verify_merge(out / "merged", out).layers == 28


def test_fsdp2_reaches_the_adapter_of_one_rank(ranks, work, driven):
    out, name = ranks / "fsdp2", "adapter_model.safetensors"
    one, two = (load_file(folder / name) for folder in (work / "one_rank", out))
    assert one.keys() == two.keys()
    difference = sum((one[key] - two[key]).square().sum() for key in one).sqrt()
    assert difference < 1e-5 * sum(one[key].square().sum() for key in one).sqrt()
    assert max(one[key].abs().max() for key in one if "qalora_B" in key) > 1e-3  # it was trained
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["qalora/offset_change"] > 0
    assert verify_merge(out / "merged", out).layers == 28


def diff_lines(prefix):
    """Return the lines of the diff in docs/axolotl.md that begin with a sign."""
    text = (ROOT / "docs" / "axolotl.md").read_text()
    lines = text.split("```diff\n")[1].split("```")[0].splitlines()
    assert len(lines) <= 6
    return [line[1:] for line in lines if line.startswith(prefix)]


RECIPES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "recipes").rglob("*.yaml")
    if path.parent.name != "accelerate"
)


@pytest.fixture(scope="session")
def validated(axolotl, work):
    """What Axolotl makes of every recipe and of its own example with our diff, in one process."""
    example = (HERE / "qlora_example.yaml").read_text().splitlines()
    removed = diff_lines("-")
    assert set(removed) <= set(example)
    ours = [line for line in example if line not in removed] + diff_lines("+")
    (work / "from_qlora.yaml").write_text("\n".join(ours) + "\n")
    command = [HERE / "validate_recipes.py", *RECIPES, work / "from_qlora.yaml"]
    printed = axolotl.run("recipes", axolotl.python, *command)
    return json.loads(printed.strip().splitlines()[-1])


def test_every_recipe_is_valid(validated):
    """By Axolotl's own validation, on one GPU and with both DeepSpeed configs."""
    assert len(RECIPES) == 24  # 17 models, 2 data sets of the paper, 4 of rl, the quickstart
    assert len(validated) == 3 * (len(RECIPES) + 1)
    assert {name: result for name, result in validated.items() if "error" in result} == {}


def test_axolotls_own_example_becomes_ours(validated, work):
    """By the diff in docs/axolotl.md, of at most six lines."""
    result = validated[str(work / "from_qlora.yaml")]
    assert result["qalora"]["bits"] == 4
    assert result["r"] == 32
    assert result["lora_dropout"] == 0.05
