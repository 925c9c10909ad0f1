"""Write the token file that compare_quantizers.py reads, from the quickstart's own data.

    .venv/bin/python integration/peers/quickstart_tokens.py TOKENS.safetensors

Calibration windows come from the training pairs, held-out windows from the evaluation pairs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from qalora_plugin.quant.calibration import calibration_windows
from qalora_plugin.quickstart.data import base_model_path, calibration_texts, load_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=128, help="most windows of each kind")
    parser.add_argument("--seq-len", type=int, default=256)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    heldout_texts = [pair["prompt"] + pair["completion"] for pair in load_pairs("eval")]

    def windows(texts: list[str]) -> torch.Tensor:
        return calibration_windows(
            texts, tokenizer, samples=arguments.samples, seq_len=arguments.seq_len
        )

    tokens = {"calibration": windows(calibration_texts()), "heldout": windows(heldout_texts)}
    save_file(tokens, arguments.out)
    print({name: tuple(ids.shape) for name, ids in tokens.items()})


if __name__ == "__main__":
    main()
