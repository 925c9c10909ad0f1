"""Train the quickstart's base model from scratch on the Python standard library.

    python recipes/quickstart/train_base.py --out /tmp/base_model --minutes 30

Writes a complete transformers directory: configs, bf16 weights, tokenizer, model card.
"""

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qalora_plugin.quantize import stdlib_text

VOCAB_SIZE = 2048
CONTEXT = 512
HELD_OUT_WINDOWS = 128
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# The headings of PROMPT_TEMPLATE: a chat turn and an instruction pair are the same tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ '### Task\\n' + message['content'] + '\\n' }}{% endif %}"
    "{% if message['role'] == 'user' and (not loop.last or add_generation_prompt) %}"
    "{{ '### Answer\\n' }}{% endif %}"
    "{% endfor %}"
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (GPT-2's pre-tokenizer) with VOCAB_SIZE entries on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the Llama of random weights: 3.7M parameters, embeddings tied."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # At this size plain matrix products are faster on a CPU than its fused attention.
    model.set_attn_implementation("eager")
    return model


def read_texts(files: list[Path]) -> list[str]:
    """Read source files; the few that are not UTF-8 get replacement characters."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[torch.Tensor]:
    """Tokenize each text to an int64 tensor [tokens] between BOS and EOS."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]) for ids in encoded]


def batches(
    documents: list[torch.Tensor], batch_size: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Yield int64 [batch_size, CONTEXT] for ever; each epoch shuffles the files, moves the cuts."""
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.cat([documents[i] for i in order])
        stream = stream[int(torch.randint(CONTEXT, (1,), generator=generator)) :]
        windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        windows = windows[torch.randperm(len(windows), generator=generator)]
        for start in range(0, len(windows) - batch_size + 1, batch_size):
            yield windows[start : start + batch_size]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, documents: list[torch.Tensor]) -> float:
    """Return the mean next-token loss in nats over spaced windows of the held-out modules."""
    stream = torch.cat(documents)
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    windows = windows[:: max(1, len(windows) // HELD_OUT_WINDOWS)][:HELD_OUT_WINDOWS]
    losses = [
        model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(8)
    ]
    return sum(losses) / len(windows)


def learning_rate_factor(progress: float, decay: float = 0.7, floor: float = 0.02) -> float:
    """Return the share of the peak rate: linear warm-up over 2 %, constant, cosine at the end."""
    if progress < 0.02:
        return max(progress / 0.02, 0.01)
    if progress < 1 - decay:
        return 1.0
    t = min((progress - (1 - decay)) / decay, 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t))


def build_optimizers(
    model: LlamaForCausalLM, args: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """Return Muon for the hidden matrices and AdamW for the embeddings and norms."""
    parameters = dict(model.named_parameters())
    hidden = [n for n, p in parameters.items() if p.ndim == 2 and "embed_tokens" not in n]
    others = [p for n, p in parameters.items() if n not in hidden]
    matrices = [parameters[n] for n in hidden]
    muon = {"lr": args.muon_lr, "weight_decay": 0.05, "adjust_lr_fn": "match_rms_adamw"}
    adamw = {"lr": args.lr, "weight_decay": 0.0, "betas": (0.9, 0.95)}
    return [torch.optim.Muon(matrices, **muon), torch.optim.AdamW(others, **adamw)]


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: list[torch.Tensor],
    facts: dict[str, str],
    out: Path,
) -> None:
    """Write the model in bf16, the tokenizer and the model card (`facts` and held-out loss)."""
    half = copy.deepcopy(model).to(torch.bfloat16).eval()
    facts["held-out loss"] = f"{held_out_loss(half, held_out):.4f} nats a token (bf16 weights)"
    half.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=128,
    )
    half.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes 0600 whatever the umask is
    tokenizer.save_pretrained(out)
    # transformers 5 names a class that transformers 4 lacks; this one both of them know.
    config_path = out / "tokenizer_config.json"
    tokenizer_config = json.loads(config_path.read_text())
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_path.write_text(json.dumps(tokenizer_config, indent=2, sort_keys=True) + "\n")
    (out / "README.md").write_text(model_card(facts))


def model_card(facts: dict[str, str]) -> str:
    """Return the model card; every number in it was measured by this run."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    held_out = ", ".join(f"`{name}`" for name in sorted(stdlib_text.HELD_OUT_MODULES))
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [llama, python, quickstart]
---
# qalora quickstart base

A small Llama trained from scratch on the sources and docstrings of the Python standard library,
so that `qalora quickstart` has a real pretrained base without a download. It writes text that looks
like Python; it is an example to quantize and fine-tune, not a coding assistant.

| | |
|---|---|
{rows}

Kept out of its training, for the instruction pairs and the held-out loss: {held_out}.
The text it learned from is under the PSF License Agreement.

Made by `recipes/quickstart/train_base.py`, which also wrote this card.
"""


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=30, help="wall-clock budget (default 30)")
    budget.add_argument("--steps", type=int, help="step budget: the same seed gives the same model")
    parser.add_argument("--batch-size", type=int, default=8, help=f"windows of {CONTEXT} a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW's peak (embeddings, norms)")
    parser.add_argument("--muon-lr", type=float, default=3e-3, help="Muon's peak rate (matrices)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=180, help="seconds between checkpoints")
    return parser.parse_args()


def main() -> None:
    """Train until the budget is spent, and write the model as it goes."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    files = stdlib_text.source_files(held_out=False)
    texts = read_texts(files)
    tokenizer = train_tokenizer(texts)
    documents = encode(tokenizer, texts)
    held_out = encode(tokenizer, read_texts(stdlib_text.source_files(held_out=True)))
    corpus_tokens = sum(map(len, documents))
    model = build_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    text = f"{len(files)} files, {corpus_tokens:,} tokens"
    print(f"{text}, {sum(map(len, texts)):,} characters; {parameters:,} parameters", flush=True)
    optimizers = build_optimizers(model, args)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    start = last_save = time.monotonic()

    def minutes() -> float:
        return (time.monotonic() - start) / 60

    step, average, progress = 0, math.log(VOCAB_SIZE), 0.0

    def facts() -> dict[str, str]:
        return {
            "parameters": f"{parameters:,}",
            "training text": text,
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "steps": f"{step:,}",
            "tokens seen": f"{step * args.batch_size * CONTEXT:,}",
            "training time": f"{minutes():.1f} minutes, {args.threads} CPU threads",
            "seed": str(args.seed),
        }

    for batch in batches(documents, args.batch_size, generator):
        progress = step / args.steps if args.steps else minutes() / args.minutes
        if progress >= 1:
            break
        factor = learning_rate_factor(progress)
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * factor
        # Half-length windows cost a third less; the last quarter teaches the whole context.
        batch = batch if progress > 0.75 else batch.view(-1, CONTEXT // 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        average += (loss.item() - average) * 0.05
        if step % 20 == 0:
            rate = f"{step * args.batch_size * CONTEXT / (60 * minutes()):,.0f} tokens/s"
            done = f"{progress:6.1%}  step {step}  loss {average:.3f}"
            print(f"{done}  {rate}  {minutes():.1f} min", flush=True)
        if time.monotonic() - last_save > args.save_every:
            save(model, tokenizer, held_out, facts(), args.out)
            last_save = time.monotonic()
    final = facts()
    save(model, tokenizer, held_out, final, args.out)
    for key, value in final.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
