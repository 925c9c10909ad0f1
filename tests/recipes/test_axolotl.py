"""Each Axolotl recipe passes the plugin's own checks, at every width that its comment offers."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from qalora_plugin.axolotl import QALoRAArgs
from qalora_plugin.axolotl.checks import check_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "recipes" / "README.md").read_text()
MODELS = sorted((ROOT / "recipes" / "models").glob("*.yaml"))
PAPER = sorted((ROOT / "recipes" / "paper").glob("*.yaml"))
PREFERENCE = sorted((ROOT / "recipes" / "preference").glob("*.yaml"))
RECIPES = [*MODELS, *PAPER, *PREFERENCE, ROOT / "recipes" / "quickstart.yaml"]


def paper_models():
    """Rows of the table in recipes/README.md, each the keys of a recipe."""
    rows = re.findall(r"^\| `(.+?)` \|.*?\| (\d+) \| (\d+) \| ([\d.]+) \|$", README, re.MULTILINE)
    keys = "base_model", "micro_batch_size", "gradient_accumulation_steps", "learning_rate"
    return [dict(zip(keys, (row[0], *map(yaml.safe_load, row[1:])), strict=True)) for row in rows]


def test_there_is_one_file_a_model_and_a_data_set():
    assert len(MODELS) == 17
    assert [path.stem for path in PAPER] == ["alpaca", "flanv2"]
    assert len(paper_models()) == 7


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_at_every_width(path):
    text = path.read_text()
    recipe = yaml.safe_load(text)
    assert recipe["plugins"] == ["qalora_plugin.axolotl.QALoRAPlugin"]
    assert f" axolotl train {path.relative_to(ROOT)}" in text
    check_config(recipe)
    for bits in (4, 3, 2):
        block = recipe["qalora"] | {"bits": bits}
        assert QALoRAArgs.model_validate({"qalora": block}).qalora.bits == bits


@pytest.mark.parametrize("path", [*MODELS, *PAPER], ids=lambda path: path.stem)
def test_recipe_says_how_to_change_the_width(path):
    text = path.read_text()
    assert re.search(r"^  bits: 4 +# for 3 or 2 bits .*change this and output_dir", text, re.M)
    recipe = yaml.safe_load(text)
    assert recipe["output_dir"].endswith("-4bit")
    assert recipe["micro_batch_size"] * recipe["gradient_accumulation_steps"] == 16


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_recipe_is_the_first_row_of_its_table(path):
    recipe = yaml.safe_load(path.read_text())
    rows = paper_models()
    assert recipe | rows[0] == recipe
    for row in rows:
        assert row["micro_batch_size"] * row["gradient_accumulation_steps"] == 16


def test_preference_recipes_name_their_method():
    assert [path.stem for path in PREFERENCE] == ["dpo", "grpo", "kto", "orpo"]
    for path in PREFERENCE:
        assert yaml.safe_load(path.read_text())["rl"] == path.stem


def test_rewards_of_gsm8k():
    path = ROOT / "recipes" / "preference" / "gsm8k_rewards.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    rewards = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rewards)
    row, _ = rewards.transform(None)
    answer = row({"question": "1000 + 1?", "answer": "so\n#### 1,001"})["answer"]
    texts = ["so 1001", "1,001", "1001, no: 7", "none"]
    assert rewards.right_number([""] * 4, texts, [answer] * 4) == [1, 1, 0, 0]
