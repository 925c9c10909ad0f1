"""What an adapter's files may hold: dtypes, numbers, its convention, the base that it names."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from support.adapters import edit_json, edit_tensors
from support.directories import unbound
from transformers import AutoModelForCausalLM

from qalora_plugin import merge_adapter
from qalora_plugin.checkpoint.describe import describe
from qalora_plugin.errors import AdapterError, QALoRAError

A = "base_model.model.model.layers.0.self_attn.q_proj.qalora_A.weight"
B = A.replace("qalora_A", "qalora_B")

TENSORS = {
    "uint8": (lambda t: t.update({A: t[A].to(torch.uint8)}), "qalora_A.weight: expected float16"),
    "int32": (lambda t: t.update({B: t[B].int()}), "qalora_B.weight: .*found int32"),
    "bool": (lambda t: t.update({A: t[A] > 0}), "found bool"),
    "complex": (lambda t: t.update({A: t[A].to(torch.complex64)}), "found complex64"),
    "fp8": (lambda t: t.update({B: t[B].to(torch.float8_e4m3fn)}), "found float8_e4m3fn"),
    "NaN": (lambda t: t[A].fill_(torch.nan), "holds NaN"),
    "infinity": (lambda t: t[B][0].fill_(-torch.inf), "holds NaN or infinity"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_no_matrices_of_floats(case, base_dir, make_adapter, tmp_path):
    change, message = TENSORS[case]
    adapter = make_adapter(base_dir)
    edit_tensors(adapter, change)
    with pytest.raises(AdapterError, match=message):
        merge_adapter(adapter, tmp_path / "merged")
    found = describe(adapter)
    assert not found["valid"] and A.rpartition("_")[0] in found["problem"]
    assert describe(adapter, quick=True)["valid"]


CONVENTIONS = [
    ({"convention": "mean"}, "expected 'sum', found 'mean'"),
    ({"convention": "peft"}, "expected 'sum', found 'peft'"),
    ({"convention": "max"}, "expected 'sum', found 'max'"),
    ({"convention": 3}, "convention: expected a valid string"),
]


@pytest.mark.parametrize(("changes", "message"), CONVENTIONS)
def test_a_convention_that_ours_do_not_have(changes, message, base_dir, make_adapter, tmp_path):
    adapter = make_adapter(base_dir, **changes)
    with pytest.raises(AdapterError, match=message):
        merge_adapter(adapter, tmp_path / "merged")


def test_a_convention_of_others_is_kept_or_refused(base_dir, make_foreign, tmp_path):
    stated = make_foreign(base_dir, 32, use_qalora=False, convention="mean")
    assert merge_adapter(stated, tmp_path / "one", base_dir).convention == "mean"
    with pytest.raises(AdapterError, match="'mean', but 'sum' was asked for"):
        merge_adapter(stated, tmp_path / "two", base_dir, convention="sum")
    torn = make_foreign(base_dir, 16, use_qalora=True, name="torn", convention="mean")
    with pytest.raises(AdapterError, match="convention: expected 'peft', found 'mean'"):
        merge_adapter(torn, tmp_path / "two", base_dir)


@pytest.mark.parametrize("kept", [True, False])
def test_an_adapter_that_names_no_fingerprint(kept, base_dir, make_adapter, tmp_path):
    adapter = make_adapter(base_dir)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    mark = config.pop("fingerprint")
    path.write_text(json.dumps(config | ({"fingerprint": None} if kept else {})))
    with pytest.raises(
        AdapterError, match=f"fingerprint: expected .*enter its fingerprint.*{mark}"
    ):
        merge_adapter(adapter, tmp_path / "merged")
    edit_json(adapter, fingerprint=mark)  # the way out
    merge_adapter(adapter, tmp_path / "merged")


def test_a_base_whose_config_names_another_fingerprint(base_dir, make_adapter, tmp_path):
    other = unbound(shutil.copytree(base_dir, tmp_path / "other"))
    edit_tensors(other / "model.safetensors", lambda t: t[A[17:-15] + "qweight"].add_(1))
    adapter = make_adapter(base_dir)
    config = json.loads((other / "config.json").read_text())
    mark = json.loads((adapter / "adapter_config.json").read_text())["fingerprint"]
    config["quantization_config"]["base"]["fingerprint"] = mark  # believed, it would merge
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="was trained on another base"):
        merge_adapter(adapter, tmp_path / "merged", other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with pytest.raises(AdapterError, match="fingerprint"):
        PeftModel.from_pretrained(model, str(adapter))


@pytest.mark.parametrize("cut", [0, 7, 100, -1, -1000])
def test_from_pretrained_of_a_truncated_adapter(cut, base_dir, make_adapter):
    adapter = make_adapter(base_dir)
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    with pytest.raises(QALoRAError, match=r"adapter_model\.safetensors: "):
        PeftModel.from_pretrained(model, str(adapter))


HOSTILE = {
    "r": 10**400,
    "lora_alpha": [1],
    "rank_pattern": {"(x+x+)+y": "4"},
    "target_modules": {"a": 1},
    "base_merged": 3,
    "bits": "4",
    "auto_mapping": [],
}


@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_values_in_its_config(key, base_dir, make_adapter, tmp_path):
    adapter = make_adapter(base_dir, layers=lambda name: "q_proj" in name)
    edit_json(adapter, **{key: HOSTILE[key]})
    with pytest.raises(QALoRAError, match=r"adapter_config\.json"):
        merge_adapter(adapter, tmp_path / "merged")
    with pytest.raises(QALoRAError, match=r"adapter_config\.json"):
        describe(adapter)


@pytest.mark.parametrize(("key", "value"), [("qalora_group_size", 0), ("adapt", "both")])
def test_hostile_values_in_the_config_of_others(key, value, base_dir, make_foreign, tmp_path):
    adapter = make_foreign(base_dir, 32, use_qalora=True, **{key: value})
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {key} must be"):
        merge_adapter(adapter, tmp_path / "merged")


def test_a_pattern_that_takes_for_ever(base_dir, make_adapter, tmp_path):
    for field in ("target_modules", "exclude_modules"):
        adapter = make_adapter(
            base_dir,
            layers=lambda name: "q_proj" in name,
            name=field,
            **{"target_modules": ["q_proj"], field: r"(\w|\w|\w|\w\w|\w\w|\w\w\w|\.)+(?<!j)"},
        )
        with pytest.raises(AdapterError, match=r"adapter_config\.json: the pattern"):
            merge_adapter(adapter, tmp_path / "merged")
