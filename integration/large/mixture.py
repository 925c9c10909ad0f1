"""Measure a mixture of 1B parameters: mixture.py WORK [quantize merge qalora lora ...].

It has random weights in Qwen3-MoE's architecture. Prints one line of JSON a measurement: the peak
of resident bytes while it is quantized and merged, and the median seconds of a training step and
its peak, ours beside PEFT's LoRA on the 16-bit mixture, both on every projection of every expert.
WORK is a directory with room for 5 GB, which keeps what was written.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from qalora_plugin import QALoRAConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # for `models`
from models import write_adapter
from support.peak import peak_of

CONFIG = Qwen3MoeConfig(
    vocab_size=32000,
    hidden_size=1024,
    num_hidden_layers=12,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=768,
    norm_topk_prob=True,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
RANK, STEPS, TOKENS = 16, 5, 512

QUANTIZE = """
import sys, torch
from qalora_plugin import quantize_model
ids = torch.randint(0, 32000, (16, 256), generator=torch.Generator().manual_seed(0))
made = quantize_model(sys.argv[1], sys.argv[2], bits=4, group_size=32, calibration=ids, samples=16,
                      seq_len=256, progress=False)
print(made.experts)
"""


def dense(work):
    """Return the 16-bit mixture, written once."""
    if not (work / "dense").exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
        model.save_pretrained(work / "dense", max_shard_size="400MB")
    return work / "dense"


def train(kind, work):
    """Time training steps of one kind in this process."""
    directory = work / "int4" if kind == "qalora" else dense(work)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    if kind == "qalora":
        config = QALoRAConfig(r=RANK, lora_alpha=RANK)
    else:
        attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = LoraConfig(r=RANK, target_modules=attention, target_parameters=experts)
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 32000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(STEPS):
        started = time.monotonic()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.monotonic() - started)
    found = {
        "step": kind,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(statistics.median(seconds[1:]), 2),
        "all": [round(value, 2) for value in seconds],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    print(json.dumps(found), flush=True)


def main(work, *steps):
    """Run the steps, each training in a process of its own."""
    work = Path(work)
    for step in steps or ("quantize", "merge", "qalora", "lora"):
        if step == "quantize":
            peak_of(step, "-c", QUANTIZE, dense(work), work / "int4")
        elif step == "merge":
            write_adapter(work / "int4", work / "adapter")
            command = ["-m", "qalora_plugin", "merge", work / "adapter"]
            peak_of(step, *command, "--out", work / "merged")
        elif len(steps) == 1:
            train(step, work)
        else:
            subprocess.run([sys.executable, __file__, str(work), step], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
