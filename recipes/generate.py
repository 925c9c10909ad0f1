"""Write the recipes of recipes/models/ and recipes/paper/; a test compares them with its output.

    python recipes/generate.py            write them
    python recipes/generate.py --check    only say which differ

One complete file for each model and width, because a recipe is something to open, change and run;
one template for all, because files that are copied by hand drift apart.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BITS = (4, 3, 2)


@dataclass(frozen=True)
class Model:
    """A base model, its pad token where the tokenizer has none, and rows a step on one GPU."""

    name: str
    base_model: str
    pad_token: str | None
    micro_batch_size: int


LLAMA3_PAD = "<|finetune_right_pad_id|>"
MODELS = [
    Model("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", "<|endoftext|>", 8),
    Model("smollm2-360m", "HuggingFaceTB/SmolLM2-360M", "<|endoftext|>", 8),
    Model("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", "<|endoftext|>", 4),
    Model("qwen3-0.6b", "Qwen/Qwen3-0.6B-Base", None, 8),
    Model("qwen3-1.7b", "Qwen/Qwen3-1.7B-Base", None, 4),
    Model("qwen3-4b", "Qwen/Qwen3-4B-Base", None, 4),
    Model("qwen3-8b", "Qwen/Qwen3-8B-Base", None, 4),
    Model("qwen3-14b", "Qwen/Qwen3-14B-Base", None, 2),
    Model("qwen3-32b", "Qwen/Qwen3-32B", None, 2),
    Model("gemma-3-1b", "google/gemma-3-1b-pt", None, 4),
    Model("llama-3.2-1b", "meta-llama/Llama-3.2-1B", LLAMA3_PAD, 8),
    Model("llama-3.1-8b", "meta-llama/Llama-3.1-8B", LLAMA3_PAD, 4),
    Model("llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct", LLAMA3_PAD, 1),
    Model("mistral-7b", "mistralai/Mistral-7B-v0.3", "<unk>", 4),
]
# Llama-2 was released in 7B, 13B and 70B only
PAPER_MODELS = [
    Model("llama-7b", "huggyllama/llama-7b", "<unk>", 4),
    Model("llama-13b", "huggyllama/llama-13b", "<unk>", 4),
    Model("llama-33b", "huggyllama/llama-30b", "<unk>", 2),
    Model("llama-65b", "huggyllama/llama-65b", "<unk>", 1),
    Model("llama-2-7b", "meta-llama/Llama-2-7b-hf", "<unk>", 4),
    Model("llama-2-13b", "meta-llama/Llama-2-13b-hf", "<unk>", 4),
    Model("llama-2-70b", "meta-llama/Llama-2-70b-hf", "<unk>", 1),
]
ALPACA = """  - path: tatsu-lab/alpaca
    type: alpaca"""
FLAN_V2 = """  # 350 thousand examples of FLAN 2022; which 320 thousand the paper took is not known
  - path: itay1itzhak/flan_2022_350k
    type: {field_instruction: prompt, field_output: completion, format: "{instruction}"}"""
# name, title, text of the block, steps
PAPER_DATA = [
    ("alpaca", "Alpaca", ALPACA, 10_000),
    ("flanv2", "FLAN v2", FLAN_V2, 20_000),
]

MODEL_RECIPE = """\
# {base_model}, INT{bits}, with QA-LoRA on Alpaca. Written by recipes/generate.py.
#   axolotl train {path}
# On several GPUs add one of
#   --deepspeed recipes/deepspeed/zero2.json     every GPU holds the whole INT{bits} model
#   --deepspeed recipes/deepspeed/zero3.json     the GPUs share it
base_model: {base_model}
plugins: [qalora_plugin.axolotl.QALoRAPlugin]

adapter: qalora
lora_r: 32
lora_alpha: 32
qalora:
  bits: {bits}
  group_size: 32
  adapt: both             # offsets and scales; zeros (the paper) needs less memory

datasets:
{data}
val_set_size: 0.02
sequence_len: 2048
sample_packing: true
{special_tokens}
output_dir: out/{name}-{bits}bit
num_epochs: 1
micro_batch_size: {micro_batch_size}
gradient_accumulation_steps: {accumulation}
learning_rate: 0.0002
lr_scheduler: cosine
warmup_ratio: 0.03
optimizer: adamw_torch_fused
gradient_checkpointing: true
bf16: true
attn_implementation: flash_attention_2
logging_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
seed: 42
"""

PAPER_RECIPE = """\
# {base_model} on {data_title}, as in the paper (arXiv 2309.14717, section 4.1).
# Written by recipes/generate.py.
#   axolotl train {path}
# On several GPUs add --deepspeed recipes/deepspeed/zero2.json (or zero3.json), and divide
# gradient_accumulation_steps by their number: the batch is 16.
base_model: {base_model}
plugins: [qalora_plugin.axolotl.QALoRAPlugin]

adapter: qalora
lora_r: 64
lora_alpha: 16
qalora:
  bits: 4                 # and 3 and 2 in the paper's tables
  group_size: 32
  adapt: zeros

datasets:
{data}
sequence_len: 1024
train_on_inputs: false
{special_tokens}
output_dir: out/{name}-{data_name}-4bit
max_steps: {steps}
micro_batch_size: {micro_batch_size}
gradient_accumulation_steps: {accumulation}
# The paper says {rate}; the authors' released code has 0.0002, which others needed to come near
# the paper's numbers.
learning_rate: {rate}
lr_scheduler: constant
max_grad_norm: 0.3
optimizer: paged_adamw_32bit
adam_beta2: 0.999
weight_decay: 0.0
gradient_checkpointing: true
bf16: true
attn_implementation: flash_attention_2
logging_steps: 10
save_steps: 1000
save_total_limit: 2
seed: 42
"""


def recipes() -> dict[str, str]:
    """Text of every recipe by its path below recipes/."""
    files = {}
    for model in MODELS:
        for bits in BITS:
            path = f"models/{model.name}-{bits}bit.yaml"
            files[path] = _fill(MODEL_RECIPE, model, path, ALPACA, bits=bits)
    for model in PAPER_MODELS:
        large = model.name.endswith(("33b", "65b", "70b"))
        for data_name, data_title, data, steps in PAPER_DATA:
            path = f"paper/{model.name}-{data_name}.yaml"
            files[path] = _fill(
                PAPER_RECIPE,
                model,
                path,
                data,
                data_name=data_name,
                data_title=data_title,
                steps=steps,
                rate="0.00001" if large else "0.00002",
            )
    return files


def _fill(template: str, model: Model, path: str, data: str, **values: object) -> str:
    pad = f'special_tokens: {{pad_token: "{model.pad_token}"}}\n' if model.pad_token else ""
    return template.format(
        name=model.name,
        base_model=model.base_model,
        path=f"recipes/{path}",
        data=data,
        special_tokens=pad,
        micro_batch_size=model.micro_batch_size,
        accumulation=16 // model.micro_batch_size,
        **values,
    )


def main() -> int:
    """Write the recipes, or with --check name those that differ; 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for name, text in recipes().items():
        path = HERE / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"{'differs' if check else 'wrote'}: recipes/{name}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
