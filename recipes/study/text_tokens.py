"""Write a token file that compare_quantizers.py reads, from a model's tokenizer and a text file.

    python recipes/study/text_tokens.py MODEL_DIR TEXT.txt OUT.safetensors

The first four fifths of the text calibrate, in several draws; the rest is judged.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from qalora_plugin.quantize.calibration import calibration_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    about = "windows of a draw: GPTQ takes the first 128, refining all"
    parser.add_argument("--samples", type=int, default=308, help=about)
    parser.add_argument("--heldout", type=int, default=64, help="windows that are judged")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir)
    text = arguments.text.read_text(encoding="utf-8")
    cut = text.rindex("\n", 0, len(text) * 4 // 5)

    def windows(part: str, samples: int, seed: int = 0) -> torch.Tensor:
        pieces = [part[start : start + 4096] for start in range(0, len(part), 4096)]
        return calibration_windows(
            pieces, tokenizer, samples=samples, seq_len=arguments.seq_len, seed=seed
        )

    draws = [windows(text[:cut], arguments.samples, seed) for seed in range(arguments.draws)]
    tokens = {"calibration": torch.stack(draws), "heldout": windows(text[cut:], arguments.heldout)}
    save_file(tokens, arguments.out)
    print({name: tuple(ids.shape) for name, ids in tokens.items()})


if __name__ == "__main__":
    main()
