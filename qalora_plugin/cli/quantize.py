"""`qalora quantize`: a 16-bit model becomes an INT-n base."""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .options import (
    OFFSETS_AT_HELP,
    at_least,
    bits,
    fraction,
    group_size,
    note_what_gguf_cannot_hold,
)
from .say import say

_OVERRIDES = {"bits": bits, "group_size": group_size}


def _bits(text: str) -> int | str:
    """Parse a width, or `auto`."""
    return text if text == "auto" else bits(text)


def _override(text: str) -> tuple[str, dict[str, int]]:
    """Parse `NAME=bits:8,group_size:64` into (name, overrides)."""
    name, _, values = text.partition("=")
    try:
        pairs = [value.split(":") for value in values.split(",")]
        overrides = {key: _OVERRIDES[key](number) for key, number in pairs}
        if len(overrides) < len(pairs):
            raise ValueError("one is given twice")
        return name, overrides
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"expected NAME=bits:B or NAME=bits:B,group_size:G, found {text!r}"
        ) from None


def add_parser(subparsers: Any) -> None:
    """Add the subcommand; what its options store has the names of `QuantizeOptions`."""
    parser = subparsers.add_parser(
        "quantize",
        help="quantize a 16-bit model to 2, 3, 4 or 8 bits",
        description="Quantize the linear layers of a model's blocks, one block in memory at a "
        "time, and write a checkpoint that QA-LoRA adapters are trained on and merged into. "
        "Started again after an interruption with the same arguments, it goes on where it "
        "stopped.",
        epilog="example: qalora quantize meta-llama/Llama-3.2-1B --out llama-int4 --bits 4 "
        "--calibration train.jsonl",
    )
    default = "(default: %(default)s)"
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory or Hub id of a 16-bit model")
    add("--out", type=Path, required=True, help="directory to make")
    about = f"2, 3, 4 or 8, or auto: those of each layer by measured sensitivity {default}"
    add("--bits", type=_bits, default=4, help=about)
    about = (
        "with --bits auto: the model is as large as with so many bits everywhere, e.g. 2.5 or 3.0, "
        "scales and offsets counted"
    )
    add("--target-bits", type=float, metavar="B", help=about)
    about = f"inputs that share a scale and an offset; -1 for one group {default}"
    add("--group-size", type=group_size, default=32, help=about)
    about = f"gptq needs --calibration and is better, rtn needs no data {default}"
    add("--method", choices=("gptq", "rtn"), default="gptq", help=about)

    add = parser.add_argument_group("calibration (method gptq)").add_argument
    about = (
        "text like that which the model will see, best the training set: .txt, or .jsonl with "
        "text, messages, prompt + completion, question + answer or instruction + output"
    )
    add("--calibration", type=Path, metavar="FILE", help=about)
    add("--samples", type=at_least(1), default=128, help=f"windows {default}")
    about = "tokens in a window (default: 512, or the model's limit)"
    add("--seq-len", type=at_least(2), help=about)
    add("--seed", type=int, default=0, help=f"of the choice of windows {default}")

    about = (
        "after GPTQ train all scales and offsets against the 16-bit model's distributions on the "
        "calibration text, the integers frozen; both models are in memory"
    )
    add = parser.add_argument_group("refining (--refine)").add_argument
    add("--refine", action="store_true", help=about)
    add("--refine-steps", type=at_least(1), default=250, help=f"optimizer steps {default}")
    about = f"peak learning rate, in quantization steps {default}"
    add("--refine-rate", type=fraction, default=0.002, help=about)
    add("--refine-batch", type=at_least(1), default=1, help=f"windows in a step {default}")
    add("--refine-norms", action="store_true", help="train the weights of norms too")

    result = parser.add_argument_group("result")
    add = result.add_argument
    about = (
        "real is more exact; integer can also be written as stock GPTQ, and merged exactly with "
        "adapt=scales; none (symmetric) also where a runtime takes only sym: true (default: real; "
        "integer with --format gptq)"
    )
    one = result.add_mutually_exclusive_group().add_argument
    one("--zero-points", choices=("real", "integer", "none"), help=about)
    about = "the same as --zero-points none"
    one("--sym", dest="zero_points", action="store_const", const="none", help=about)
    about = (
        "which weight of a group fp16 holds, the one at the middle code or at code 0; "
        f"{OFFSETS_AT_HELP}. Takes 2 bytes a group more in memory {default}"
    )
    add("--offsets-at", choices=("middle", "minimum"), default="middle", help=about)
    about = f"gptq and gptq_v2: stock checkpoints that AutoGPTQ and GPTQModel run {default}"
    add("--format", choices=("qalora", "gptq", "gptq_v2"), default="qalora", help=about)
    about = (
        "a layer that stays in 16 bits (whole name, last part, or a pattern with *); may be "
        "repeated. What is outside the blocks (embeddings, lm_head) always does"
    )
    add("--keep", dest="modules_to_not_convert", action="append", metavar="NAME", help=about)
    about = "another grid for some layers, e.g. '*.down_proj=bits:8'; may be repeated"
    form = "NAME=bits:B,group_size:G"
    add("--override", dest="dynamic", action="append", type=_override, metavar=form, help=about)

    add = parser.add_argument_group("solver").add_argument
    about = "act-order: round inputs by size, groups scattered (stored as g_idx)"
    add("--desc-act", action="store_true", help=about)
    about = "without --desc-act: larger groups first, or as they come (default: groups)"
    add("--ordering", choices=("groups", "none"), help=about)
    add("--no-mse", dest="mse", action="store_false", help="do not search clipped ranges")
    add("--damp", type=fraction, default=0.01, help=f"damping of the Hessian {default}")
    about = "of the activations (default: the model's)"
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=about)
    add("--device", default="cpu", help=f"cpu or cuda {default}")

    add = parser.add_argument
    add("--revision", help="branch, tag or commit of a Hub repository")
    about = "run Python code that the model brings"
    add("--trust-remote-code", action="store_true", help=about)
    add("--json", action="store_true", help="print the result as JSON on stdout")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run it; progress goes to stderr, the result to stdout."""
    import torch

    from ..quantize.options import OptionError, QuantizeOptions
    from ..quantize.pipeline import quantize_model

    names = {field.name for field in dataclasses.fields(QuantizeOptions)}
    settings = {name: value for name, value in vars(args).items() if name in names}
    settings["dtype"] = getattr(torch, args.dtype) if args.dtype else None
    settings["dynamic"] = dict(args.dynamic or ())
    if len(settings["dynamic"]) < len(args.dynamic or ()):
        given = Counter(name for name, _ in args.dynamic)
        raise ConfigError(
            f"--override: {given.most_common(1)[0][0]!r} is given more than once, found "
            f"{args.dynamic}. Give one with both numbers, NAME=bits:B,group_size:G"
        )
    try:
        options = QuantizeOptions(**settings)
    except OptionError as error:
        raise ConfigError(error.spelled(_as_argument)) from None
    note_what_gguf_cannot_hold(args)
    result = quantize_model(args.model, args.out, options=options)
    if args.json:
        say(json.dumps({**dataclasses.asdict(result), "out": str(result.out)}))
        return 0
    errors = {n: layer["error"] for n, layer in result.layers.items() if layer["error"] is not None}
    widths = sorted(Counter(layer["bits"] for layer in result.layers.values()).items())
    counts = ", ".join(f"{count} layers in {width} bits" for width, count in widths)
    say(f"{result.out}: {counts}")
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        mean = sum(errors.values()) / len(errors)
        say(f"relative error on calibration: mean {mean:.2e}, {errors[worst]:.2e} in {worst}")
    if result.experts:
        few, total = (result.experts[key] for key in ("few_tokens", "calibrated"))
        say(
            f"experts: {few} of {total} saw fewer tokens than they have inputs, and were "
            "calibrated on all tokens"
        )
    if result.refined:
        before, after = (result.refined[f"heldout_kl_{when}"] for when in ("before", "after"))
        say(f"held-out KL from the 16-bit model: {before:.4f}, refined {after:.4f}")
    say(f"in 16 bits: {', '.join(result.kept) or 'no linear layer'}", file=sys.stderr)
    return 0


def _as_argument(option: str, value: str | None) -> str:
    argument = f"--{option.replace('_', '-')}"
    return f"{argument} {value}" if value else argument
