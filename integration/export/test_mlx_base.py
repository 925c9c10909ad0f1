"""A model that MLX quantized is trained, merged and written back, and mlx-lm runs the result."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from qalora_plugin import MergeCallback, QALoRAConfig, export_model, verify_merge
from qalora_plugin.quickstart.embedded import base_model_path
from qalora_plugin.training.callback import ADAPTER_DIR

IDS = torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
TEXTS = [f"The {thing} is a word of {len(thing)} letters." for thing in ("moon", "river", "sea")]
FILE = "model.safetensors"
CASES = [(2, 32, "float16"), (3, 64, "bfloat16"), (4, 64, "bfloat16"), (8, 128, "float16")]


def logits_of(model):
    """Return the logits of a model, or of the directory of one, in fp32."""
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(("bits", "group_size", "dtype"), CASES)
def test_trained_and_written_back(
    bits, group_size, dtype, env_python, run_python, run_export, tmp_path
):
    base, adapter, merged = (tmp_path / name for name in ("mlx", "run", "merged"))
    convert = ["-m", "mlx_lm", "convert", "--hf-path", base_model_path(), "--mlx-path", base, "-q"]
    grid = ["--q-bits", bits, "--q-group-size", group_size, "--dtype", dtype]
    run_python(env_python("export"), *convert, *grid)
    trainer = SFTTrainer(
        str(base),
        args=SFTConfig(
            output_dir=str(adapter),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=5e-3,
            max_length=32,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": torch.float32},
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS * 4}),
        peft_config=QALoRAConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"),
        callbacks=[MergeCallback(merged)],
    )
    trainer.train()
    report = verify_merge(merged, adapter / ADAPTER_DIR, base)
    assert report.output_error <= 1 < report.output_change

    written = export_model(merged, tmp_path / "written", "original").out
    before, after = load_file(base / FILE), load_file(written / FILE)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and {name.rpartition(".")[2] for name in changed} == {"biases"}
    assert not any("embed" in name for name in changed)

    trained = logits_of(trainer.model.float())
    _, found = run_export("mlx", written, IDS)
    torch.testing.assert_close(found["logits"], trained, atol=1e-3, rtol=0)
    assert (trained - logits_of(base)).abs().max() > 0.1
    assert torch.equal(logits_of(written), logits_of(merged))
