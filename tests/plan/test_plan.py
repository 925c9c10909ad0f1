"""Numbers of a plan that can be derived by hand, and `qalora plan`."""

import json
from dataclasses import asdict

import pytest
from support.gguf_files import write_gguf
from transformers import BloomConfig, GraniteMoeConfig, LlamaConfig, MixtralConfig

from qalora_plugin.checkpoint.describe import describe
from qalora_plugin.cli import build_parser, main
from qalora_plugin.errors import CheckpointError, ConfigError
from qalora_plugin.plan import PlanSettings, count_parameters, load_shape, plan_method
from qalora_plugin.plan.memory import PARTS, ZERO2_BUCKET
from qalora_plugin.plan.settings import CHOICES
from qalora_plugin.quickstart.embedded import base_model_path

LAYERS, HIDDEN, WIDE, VOCAB, TOKENS, R = 2, 64, 128, 256, 64, 8
WEIGHTS = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE)
# A [r, G] and B [N, r] of q, k, v, o; gate and up; down, at groups of 32
ADAPTER = LAYERS * R * (4 * (2 + HIDDEN) + 2 * (2 + WIDE) + (4 + HIDDEN))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    config.save_pretrained(directory)
    return directory


def planned(directory, method="qalora", **options):
    settings = PlanSettings(**{"r": R, "seq_len": TOKENS, **options})
    return plan_method(method, load_shape(str(directory), settings), settings)


def test_weights_adapters_and_optimizer(tiny):
    memory = planned(tiny).memory
    assert tuple(memory) == PARTS
    assert memory["linear_weights"] == WEIGHTS * 4 // 8
    assert memory["scales_offsets"] == WEIGHTS // 32 * 4  # two fp16 numbers a group
    assert memory["adapters"] == memory["gradients"] == ADAPTER * 4
    assert memory["optimizer"] == ADAPTER * 8
    rest = 2 * (2 * VOCAB * HIDDEN + (2 * LAYERS + 1) * HIDDEN)
    # and the rotary frequencies, one or two fp32 numbers for each pair of a head's 16
    assert rest <= memory["rest"] <= rest + 2 * 8 * 4


@pytest.mark.parametrize("bits, group_size", [(2, 64), (3, 32), (8, -1)])
def test_the_grid(tiny, bits, group_size):
    memory = planned(tiny, bits=bits, group_size=group_size).memory
    assert memory["linear_weights"] == WEIGHTS * bits // 8
    columns = LAYERS * (6 * HIDDEN + 2 * WIDE)  # N of every layer, one group of 64 or fewer
    if group_size == -1:
        columns = LAYERS * (5 * HIDDEN + 2 * WIDE)
    if group_size != 32:
        assert memory["scales_offsets"] == columns * 4


def test_lora_and_qlora_weights(tiny):
    lora, qlora = planned(tiny, "lora"), planned(tiny, "qlora")
    adapter = LAYERS * R * (4 * 2 * HIDDEN + 3 * (HIDDEN + WIDE))  # A [r, K], B [N, r], fp32
    assert lora.memory["linear_weights"] == WEIGHTS * 2
    assert lora.memory["scales_offsets"] == 0
    assert qlora.memory["linear_weights"] == WEIGHTS // 2
    # a byte for 64 weights, and fp32 for 256 of these, in each layer rounded up
    assert qlora.memory["scales_offsets"] == WEIGHTS // 64 + LAYERS * 7 * 4
    assert lora.memory["adapters"] == qlora.memory["adapters"] == adapter * 4
    assert qlora.disk["merged"] == lora.disk["merged"] == lora.disk["base"]
    assert qlora.disk["base"] < lora.disk["base"]


def test_zeros_keeps_pooled_inputs_and_scales_keeps_inputs(tiny):
    kept = {mode: planned(tiny, adapt=mode).memory["activations"] for mode in ("zeros", "both")}
    kept["scales"] = planned(tiny, adapt="scales").memory["activations"]
    pooled = 6 * HIDDEN // 32 + WIDE // 32  # K / g numbers a token of each of seven layers
    assert kept["both"] - kept["scales"] == LAYERS * TOKENS * pooled * 2
    # x of q, k, v is one tensor, and that of gate and up; attention keeps x of o itself
    inputs = HIDDEN + HIDDEN + WIDE
    assert kept["both"] - kept["zeros"] == LAYERS * TOKENS * inputs * 2


def test_gradient_checkpointing_keeps_the_blocks_inputs(tiny):
    kept = planned(tiny, gradient_checkpointing=True).memory["activations"]
    inputs = LAYERS * TOKENS * HIDDEN * 2
    assert inputs <= kept < 6 * inputs
    assert kept < planned(tiny).memory["activations"] / 3


def test_activations_grow_with_the_batch(tiny):
    one, four = planned(tiny).memory, planned(tiny, micro_batch=4).memory
    assert 3.5 * one["activations"] < four["activations"] < 4.01 * one["activations"]
    assert one["linear_weights"] == four["linear_weights"]


def test_rows_are_not_taken_for_packed_ones(tiny):
    """A mask of seq_len squared in every layer would make the activations grow faster."""
    one, two = planned(tiny, seq_len=512).memory, planned(tiny, seq_len=1024).memory
    assert 1.99 * one["activations"] < two["activations"] < 2.01 * one["activations"]


def test_a_cpu_allocates_the_same_without_a_context(tiny):
    gpu = planned(tiny)
    assert gpu.memory["runtime"] > 0
    assert planned(tiny, device="cpu").memory == {**gpu.memory, "runtime": 0}


def test_zero_stages(tiny):
    one = planned(tiny)
    two = planned(tiny, gpus=8, zero=2)
    three = planned(tiny, gpus=8, zero=3)
    assert two.memory["linear_weights"] == one.memory["linear_weights"]
    assert two.memory["gradients"] == ADAPTER * 2 // 8  # cast to bf16
    assert two.memory["optimizer"] == ADAPTER * (4 + 8) // 8  # with an fp32 copy
    assert two.memory["communication"] == 2 * ZERO2_BUCKET * 2
    # layers up to 10 * hidden_size words stay whole
    whole, shared = 4 * HIDDEN * HIDDEN // 8, 3 * HIDDEN * WIDE // 8
    assert three.memory["linear_weights"] == LAYERS * 4 * (whole + shared // 8)
    # each part of a grid is below that limit
    assert three.memory["scales_offsets"] == one.memory["scales_offsets"]
    offloaded = planned(tiny, gpus=8, zero=3, offload="all")
    assert offloaded.memory["optimizer"] == offloaded.memory["gradients"] == 0
    assert offloaded.memory["linear_weights"] == LAYERS * 4 * whole
    assert offloaded.host > 0 and three.host == 0


def test_plain_data_parallel_has_buckets(tiny):
    assert planned(tiny).memory["communication"] == 0
    assert planned(tiny, gpus=2).memory["communication"] == ADAPTER * 4


def test_optimizers(tiny):
    assert planned(tiny, optimizer="sgd").memory["optimizer"] == 0
    # no matrix here has 4096 elements, so bitsandbytes keeps 32 bits
    assert planned(tiny, optimizer="adamw_8bit").memory["optimizer"] == ADAPTER * 8
    wide = planned(tiny, optimizer="adamw_8bit", r=64).memory
    assert wide["optimizer"] < wide["gradients"] * 2 * 0.35


def test_disk_is_that_of_a_written_checkpoint(tmp_path):
    source, out = str(base_model_path()), tmp_path / "base"
    assert main(["quantize", source, "--out", str(out), "--method", "rtn"]) == 0
    written = describe(out, quick=True)["bytes"]["total"]
    assert planned(source).disk["base"] == planned(out).disk["base"] == written


def test_a_quantized_base_states_its_grid(tmp_path):
    out = tmp_path / "base"
    arguments = ["--method", "rtn", "--bits", "3", "--group-size", "64"]
    assert main(["quantize", str(base_model_path()), "--out", str(out), *arguments]) == 0
    shape = load_shape(str(out), PlanSettings())
    assert (shape.base.bits, shape.base.group_size) == (3, 64)
    with pytest.raises(ConfigError, match=r"with bits=3, --bits asks for 4\. Leave --bits out"):
        load_shape(str(out), PlanSettings(bits=4))
    load_shape(str(out), PlanSettings(bits=3, group_size=64))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 500}))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 500, 4 when"):
        load_shape(str(out), PlanSettings())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"offload": "all", "zero": 2}, "needs ZeRO stage 3"),
        ({"offload": "optimizer"}, "needs ZeRO stage 2"),
        ({"r": 0}, "r: expected 1 or more"),
        ({"zero": 1}, "zero: expected one of"),
        ({"optimizer": "adagrad"}, "optimizer: expected one of"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        PlanSettings(**options)


def test_the_command_has_the_settings_defaults():
    args = vars(build_parser().parse_args(["plan", "model"]))
    assert {name: args[name] for name in asdict(PlanSettings())} == asdict(PlanSettings())


@pytest.mark.parametrize("name", CHOICES)
def test_the_command_takes_the_settings_choices(name, capsys):
    option = f"--{name}"
    for value in CHOICES[name]:
        args = build_parser().parse_args(["plan", "model", option, str(value)])
        assert getattr(args, name) == value
    with pytest.raises(SystemExit) as stopped:
        build_parser().parse_args(["plan", "model", option, "7"])
    assert stopped.value.code == 2 and "invalid choice" in capsys.readouterr().err


@pytest.fixture
def experts(tmp_path):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def test_every_expert_counts(experts):
    lora = planned(experts, "lora").memory
    assert lora["linear_weights"] == (4 + 2 * 3) * 32 * 32 * 2
    assert lora["adapters"] == (4 + 2 * 3) * R * (32 + 32) * 4
    memory, disk = planned(experts).memory, planned(experts).disk
    assert memory["linear_weights"] == (4 + 2 * 3) * 32 * 32 // 2
    assert memory["adapters"] == (4 + 2 * 3) * R * (1 + 32) * 4
    assert planned(experts, "qlora").disk["merged"] == lora_base(experts)
    guards = (4 + 2 * 3) * 4
    assert disk["base"] - guards == memory["linear_weights"] + memory["scales_offsets"] + dense(
        experts
    )


def lora_base(directory):
    return planned(directory, "lora").disk["base"]


def dense(directory):
    """Bytes in a file of what is not quantized: rotary frequencies are in none."""
    return lora_base(directory) - planned(directory, "lora").memory["linear_weights"]


def test_active_parameters(experts, capsys):
    settings = PlanSettings()
    total, active = count_parameters(load_shape(str(experts), settings), settings)
    outside = 2 * 64 * 32 + 3 * 32 + 2 * 32  # embeddings and head, norms, router
    assert total == outside + (4 + 2 * 3) * 32 * 32
    assert active == outside + (4 + 1 * 3) * 32 * 32
    assert main(["plan", str(experts), "--seq-len", "64"]) == 0
    assert "0.00 B parameters, of which a token uses 0.00 B" in capsys.readouterr().out
    assert main(["plan", str(experts), "--seq-len", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["parameters"]
    assert found == {"total": total, "active": active}


def test_all_routed_tokens_are_kept_for_the_backward(experts):
    one, two = (planned(experts, seq_len=n, adapt="scales").memory for n in (512, 1024))
    assert 1.99 * one["activations"] < two["activations"] < 2.01 * one["activations"]


def test_a_model_without_sdpa_is_planned(tmp_path):
    sizes = {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    config = BloomConfig(**sizes, architectures=["BloomForCausalLM"])
    config.save_pretrained(tmp_path)
    assert planned(tmp_path, seq_len=TOKENS).memory["activations"] > 0


def test_a_path_that_depends_on_data_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    GraniteMoeConfig(vocab_size=64, num_hidden_layers=1, **sizes).save_pretrained(tmp_path)
    settings = PlanSettings(seq_len=TOKENS)
    shape = load_shape(str(tmp_path), settings)
    shape.config._experts_implementation = "eager"  # a loop over the experts that were hit
    with pytest.raises(ConfigError, match="depends on the data"):
        plan_method("qalora", shape, settings)


def test_json(tiny, capsys):
    options = ["--seq-len", "32", "--gpu-memory", "1", "0.0001", "--json"]
    assert main(["plan", str(tiny), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["bits"] == 4 and found["settings"]["seq_len"] == 32
    assert list(found["methods"]) == ["qalora", "lora", "qlora"]
    for method in found["methods"].values():
        assert set(method) == {"memory", "host", "disk", "total", "fits"}
        assert set(method["memory"]) == set(PARTS)
        assert set(method["disk"]) == {"base", "adapter", "merged"}
        assert method["total"] == sum(method["memory"].values())
        assert method["fits"] == {"1": True, "0.0001": False}


def test_table(tiny, capsys):
    assert main(["plan", str(tiny), "--gradient-checkpointing"]) == 0
    text, notes = capsys.readouterr()
    for words in ("QA-LoRA", "QLoRA", "integers", "activations", "on 24 GiB", "on disk: merged"):
        assert words in text
    assert "allocated bytes. Resident memory is more" in text
    assert "1 GPU(s)" in text and "max_position_embeddings" not in notes
    assert main(["plan", str(tiny), "--device", "cpu", "--seq-len", "2049"]) == 0
    text, notes = capsys.readouterr()
    assert "1 process(es)" in text and "GPU" not in text and "GiB  fits" not in text
    assert "takes 2048 tokens (max_position_embeddings), planned for rows of 2049" in notes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--group-size", "129"], "group_size 129 is larger than the inputs of every layer"),
        (["--offload", "all"], "needs ZeRO stage 3"),
        (["--target-modules", "nothing"], "matches no module"),
        (["--gpu-memory", "-1"], "expected GiB above 0"),
        (["--gpu-memory", "80", "nan"], "expected GiB above 0, found nan"),
    ],
)
def test_bad_input_is_one_line(tiny, arguments, message, capsys):
    assert main(["plan", str(tiny), *arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("qalora: error: ") and message in lines[-1]


def test_no_config(tmp_path, capsys):
    assert main(["plan", str(tmp_path)]) == 1
    assert "expected a config.json, found none. Give the directory" in capsys.readouterr().err
    adapter = {"peft_type": "QALORA", "base_model_name_or_path": "org/name"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert main(["plan", str(tmp_path)]) == 1
    assert "it is an adapter. Give the model that it was trained on, org/name" in (
        capsys.readouterr().err
    )
    assert main(["plan", str(tmp_path / "nowhere" / "at" / "all")]) == 1
    assert "found neither" in (error := capsys.readouterr().err) and "Check the name" in error


def test_layers_that_are_not_converted_stay_dense(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "qalora",
        "bits": 4,
        "group_size": 32,
        "modules_to_not_convert": ["down_proj"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    dense = LAYERS * HIDDEN * WIDE
    packed = (WEIGHTS - dense) * 4 // 8
    assert planned(tmp_path).memory["linear_weights"] == packed + dense * 2
    assert planned(tmp_path, "qlora").memory["linear_weights"] == packed + dense * 2
    assert planned(tmp_path, "qlora").disk["merged"] == planned(tmp_path, "lora").disk["merged"]


def test_another_quantization_is_refused(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantized with 'hqq'"):
        load_shape(str(tmp_path), PlanSettings())


def test_another_grid_than_that_of_a_file_is_refused(tmp_path):
    file = write_gguf(tmp_path / "model.gguf")
    assert load_shape(str(file), PlanSettings(bits=4, group_size=32)).quantized
    with pytest.raises(ConfigError, match=r"model\.gguf: is quantized with bits=4, --bits asks"):
        load_shape(str(file), PlanSettings(bits=2))
