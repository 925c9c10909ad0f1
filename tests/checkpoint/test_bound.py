"""config.json bound to the tensors: what changes a number is refused at every door, by name."""

import json
import math
import shutil
from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from support.directories import unbound
from support.random_adapter import random_adapter
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAConfig, export_model, merge_adapter, verify_merge
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.describe import describe
from qalora_plugin.errors import CheckpointError, QALoRAError
from qalora_plugin.files.binding import (
    METADATA_KEY,
    bound_metadata,
    check_bound,
    compare,
    numbers_in,
)
from qalora_plugin.files.names import ADAPTER_CONFIG_FILE, CONFIG_FILE, MANIFEST_FILE
from qalora_plugin.hub.push import push


@pytest.fixture(scope="module")
def made(base_dir, tmp_path_factory):
    """A base, an adapter, and what they merge into."""
    root = tmp_path_factory.mktemp("bound")
    adapter = random_adapter(open_quantized(base_dir), root / "adapter")
    merged = merge_adapter(adapter, root / "merged", base_dir).out
    return base_dir, adapter, merged


def edit(directory, *path, value):
    """Set a key of config.json, below others if several are named; None removes it."""
    config = json.loads((directory / CONFIG_FILE).read_text())
    holder = config
    for key in path[:-1]:
        holder = holder.setdefault(key, {})
    if value is None:
        holder.pop(path[-1], None)
    else:
        holder[path[-1]] = value
    (directory / CONFIG_FILE).write_text(json.dumps(config))


QUANTIZATION = "quantization_config"
PATH = Path("directory", CONFIG_FILE)
CHANGES = {
    "group size, same number of groups": ((QUANTIZATION, "group_size"), 33),
    "bits": ((QUANTIZATION, "bits"), 3),
    "dynamic, same number of groups": (
        (QUANTIZATION, "dynamic"),
        {"down_proj": {"group_size": 33}},
    ),
    "offsets_at": ((QUANTIZATION, "offsets_at"), "minimum"),
    "merged mark removed": ((QUANTIZATION, "merged"), None),
    "modules_to_not_convert": ((QUANTIZATION, "modules_to_not_convert"), ["embed_tokens"]),
    "layers": (("num_hidden_layers",), 1),
    "tied": (("tie_word_embeddings",), True),
    "vocabulary": (("vocab_size",), 65),
    "model type": (("model_type",), "mistral"),
    "class": (("architectures",), ["MistralForCausalLM"]),
    "rope": (("rope_parameters", "rope_theta"), 500.0),
    "norm": (("rms_norm_eps",), 1e-3),
    "heads": (("num_attention_heads",), 8),
    "window": (("sliding_window",), 4),
    "dtype": (("dtype",), "float16"),
    "activation": (("hidden_act",), "gelu"),
    "a key that nobody knows": (("logit_scale",), 0.5),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_key_is_named_at_every_door(case, made, tmp_path):
    path, value = CHANGES[case]
    _, adapter, merged = made
    directory = shutil.copytree(merged, tmp_path / "m")
    edit(directory, *path, value=value)
    doors = {
        "open": lambda: open_quantized(directory),
        "load": lambda: AutoModelForCausalLM.from_pretrained(directory),
        "verify": lambda: verify_merge(directory, adapter, made[0]),
        "export": lambda: export_model(directory, tmp_path / "out", "mlx"),
        "push": lambda: push(directory, "someone/model", dry_run=True),
    }
    for name, door in doors.items():
        with pytest.raises((QALoRAError, TypeError, ValueError)) as caught:
            door()
        if name != "load":  # transformers may refuse it first
            assert ".".join(path) in str(caught.value), name
            assert str(directory / CONFIG_FILE) in str(caught.value)
    assert path[-1] in describe(directory)["problem"]
    assert not (tmp_path / "out").exists()


def test_without_the_manifest_the_tensors_know(made, tmp_path):
    directory = shutil.copytree(made[2], tmp_path / "m")
    (directory / MANIFEST_FILE).unlink()
    edit(directory, QUANTIZATION, "merged", value=None)
    with pytest.raises(CheckpointError, match=r"quantization_config\.merged is not there, "):
        merge_adapter(made[1], tmp_path / "twice", directory)


def test_harmless_keys_may_be_edited(made, tmp_path):
    directory = shutil.copytree(made[2], tmp_path / "m")
    edit(directory, "transformers_version", value="4.0")
    edit(directory, "use_cache", value=False)
    edit(directory, QUANTIZATION, "base", "name_or_path", value="elsewhere")
    checkpoint = open_quantized(directory)
    assert checkpoint.bound and describe(directory)["config_bound"] is True


def test_a_checkpoint_of_an_earlier_release_is_read_and_said_to_be_unbound(made, tmp_path):
    directory = unbound(shutil.copytree(made[2], tmp_path / "m"))
    edit(directory, "rms_norm_eps", value=1e-5)
    assert not open_quantized(directory).bound
    found = describe(directory)
    assert found["valid"] and found["config_bound"] is False and found["hashes_checked"] is False


def test_every_shard_is_bound(base_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    model.save_pretrained(tmp_path / "m", max_shard_size="30KB")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert METADATA_KEY in file.metadata()
    edit(tmp_path / "m", QUANTIZATION, "group_size", value=33)
    with pytest.raises(CheckpointError, match=r"quantization_config\.group_size is 33, 32 when"):
        open_quantized(tmp_path / "m")


def test_the_order_of_dynamic_counts():
    first = {QUANTIZATION: {"dynamic": {"a": {"bits": 4}, "b": {"bits": 8}}}}
    second = {QUANTIZATION: {"dynamic": {"b": {"bits": 8}, "a": {"bits": 4}}}}
    compare(numbers_in(first, CONFIG_FILE), numbers_in(first, CONFIG_FILE), PATH, "the tensors")
    with pytest.raises(CheckpointError, match=r"the order of quantization_config\.dynamic"):
        compare(
            numbers_in(first, CONFIG_FILE), numbers_in(second, CONFIG_FILE), PATH, "the tensors"
        )


def test_numbers_compare_as_numbers():
    one, other = {"a": 1, "b": [1.0], "c": math.nan}, {"a": 1.0, "b": [1], "c": math.nan}
    compare(one, other, PATH, "the tensors")
    with pytest.raises(CheckpointError, match="a is True"):
        compare({"a": 1}, {"a": True}, PATH, "the tensors")


def test_the_fingerprint_is_bound_by_the_manifest_alone():
    config = {QUANTIZATION: {"bits": 4, "base": {"fingerprint": "f", "name_or_path": "x"}}}
    assert numbers_in(config, CONFIG_FILE) == {
        QUANTIZATION: {"bits": 4, "base": {"fingerprint": "f"}}
    }
    other = {QUANTIZATION: {"bits": 4, "base": {"fingerprint": "g"}}}
    assert check_bound(bound_metadata(config, CONFIG_FILE), other, PATH)
    with pytest.raises(CheckpointError, match=r"base\.fingerprint is 'g', 'f' when"):
        compare(numbers_in(config, CONFIG_FILE), numbers_in(other, CONFIG_FILE), PATH, "tensors")


def test_an_adapter_is_bound_to_what_scales_it(made, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(made[0])
    get_peft_model(model, QALoRAConfig(r=4)).save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / MANIFEST_FILE).exists()
    path = tmp_path / "a" / ADAPTER_CONFIG_FILE
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(made[0]), "seed": 5}))
    merge_adapter(tmp_path / "a", tmp_path / "merged")
    for key, value in {"lora_alpha": 16, "use_rslora": True, "fingerprint": "0" * 32}.items():
        path.write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=f"{key} is "):
            merge_adapter(tmp_path / "a", tmp_path / "other", made[0])
        with pytest.raises(CheckpointError, match=f"{key} is "):
            PeftModel.from_pretrained(model, str(tmp_path / "a"))
