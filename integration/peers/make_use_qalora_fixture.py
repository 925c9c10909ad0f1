"""Train adapters with PEFT's `use_qalora` on a stock GPTQ base, and write PEFT's reference outputs.

    PYTHON integration/peers/make_use_qalora_fixture.py BASE_DIR OUT_DIR --qalora-group-size 32

PYTHON is the one that `integration/envs/build.py gptqmodel` prints. OUT_DIR gets PEFT's adapter and
`reference.safetensors`: `input_ids` int64 [B, T], `logits` and `base_logits` fp32 [B, T, vocab],
with and without the adapter, from GPTQModel's torch kernel in float32.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes minutes here, running milliseconds

import torch
from make_stock_fixture import load_float32, save_reference
from peft import LoraConfig, get_peft_model

STEPS = 20
# PEFT's "all-linear" does not see GPTQModel's layers.
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(base, group_size):
    """Train a few Adam steps on random tokens, enough for lora_B to be far from zero."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGET_MODULES,
        task_type="CAUSAL_LM",
        use_qalora=True,
        qalora_group_size=group_size,
    )
    torch.manual_seed(3)
    model = get_peft_model(base, config)
    # GPTQModel turns torch.nn.init's functions off for good, which leaves lora_A uninitialised.
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            parameter.data.uniform_(-bound, bound)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        input_ids = torch.randint(2, base.config.vocab_size, (4, 32))
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--qalora-group-size", type=int, required=True)
    arguments = parser.parse_args()

    base_dir, out = arguments.base.resolve(), arguments.out.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # GPTQModel writes its logs into the working directory
        model = train(load_float32(base_dir), arguments.qalora_group_size)
    input_ids = torch.randint(2, model.config.vocab_size, (1, 16))
    with torch.no_grad():
        tensors = {"input_ids": input_ids, "logits": model(input_ids=input_ids).logits}
        with model.disable_adapter():
            tensors["base_logits"] = model(input_ids=input_ids).logits
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_dir.name  # a sibling directory, not this machine's path
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    save_reference(tensors, out)
    change = (tensors["logits"] - tensors["base_logits"]).abs().max().item()
    print(json.dumps({"out": str(out), "change_of_logits": change}))


if __name__ == "__main__":
    main()
