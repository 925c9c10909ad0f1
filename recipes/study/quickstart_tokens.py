"""Write a token file that compare_quantizers.py reads, from the quickstart's own data.

    .venv/bin/python recipes/study/quickstart_tokens.py sources.safetensors --text sources

`sources`: what the base was trained on, to calibrate, and the standard library's modules that it
was not trained on, to judge: the text of the held-out loss in its model card. `pairs`: the
instruction pairs of the quickstart's training and evaluation, in a form that the base has never
seen, every token of them. `completions` and `prompts`: the same, judged on one part of a pair
alone; the quickstart's own held-out loss is that of completions. Calibration windows come in
several draws.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from qalora_plugin.quantize.calibration import calibration_windows
from qalora_plugin.quantize.stdlib_text import calibration_texts, load_pairs, source_files
from qalora_plugin.quickstart.embedded import base_model_path
from qalora_plugin.quickstart.evaluate import IGNORED, encode, pad, row_text

TEXTS = ("sources", "pairs", "completions", "prompts")


def judged_pairs(tokenizer: Any, part: str) -> dict[str, torch.Tensor]:
    """Return `heldout` and `labels`, int64 [pairs, longest], of the quickstart's evaluation."""
    ids, completions = zip(*(encode(tokenizer, pair) for pair in load_pairs("eval")), strict=True)
    heldout, labels = pad(ids, 0), pad(completions, IGNORED)
    if part == "prompts":
        position = torch.arange(heldout.shape[1])
        lengths = torch.tensor([[len(row)] for row in ids])
        prompt = (labels == IGNORED) & (position > 0) & (position < lengths)
        labels = torch.where(prompt, heldout, IGNORED)
    return {"heldout": heldout, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=128, help="windows of a draw; most held out")
    parser.add_argument("--text", choices=TEXTS, required=True)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--seq-len", type=int, default=256)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    if arguments.text == "sources":
        files = source_files(held_out=False), source_files(held_out=True)
        texts, heldout_texts = ([path.read_text("utf-8") for path in group] for group in files)
    else:
        texts = calibration_texts()
        heldout_texts = [row_text(pair) for pair in load_pairs("eval")]

    def windows(texts: list[str], samples: int, seed: int = 0) -> torch.Tensor:
        return calibration_windows(
            texts, tokenizer, samples=samples, seq_len=arguments.seq_len, seed=seed
        )

    draws = [windows(texts, arguments.samples, seed) for seed in range(arguments.draws)]
    tokens = {"calibration": torch.stack(draws)}
    if arguments.text in ("completions", "prompts"):
        tokens |= judged_pairs(tokenizer, arguments.text)
    else:
        tokens["heldout"] = windows(heldout_texts, arguments.samples)
    save_file(tokens, arguments.out)
    print({name: tuple(ids.shape) for name, ids in tokens.items()})


if __name__ == "__main__":
    main()
