"""`qalora quantize`: a 16-bit model becomes an INT-n base."""

import argparse
import dataclasses
import json
import sys
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

_OVERRIDES = {"bits": bits, "group_size": group_size}


def _override(text: str) -> tuple[str, dict[str, int]]:
    """`NAME=bits:8,group_size:64` as (name, overrides)."""
    name, _, values = text.partition("=")
    try:
        pairs = [value.split(":") for value in values.split(",")]
        return name, {key: _OVERRIDES[key](number) for key, number in pairs}
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"expected NAME=bits:B or NAME=bits:B,group_size:G, found {text!r}"
        ) from None


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
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
    parser.add_argument("model", metavar="MODEL", help="directory or Hub id of a 16-bit model")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--bits", type=bits, default=4, help="2, 3, 4 or 8 (default: %(default)s)")
    parser.add_argument(
        "--group-size",
        type=group_size,
        default=32,
        help="inputs that share a scale and an offset; -1 for one group (default: %(default)s)",
    )
    parser.add_argument(
        "--method",
        choices=("gptq", "rtn"),
        default="gptq",
        help="gptq needs --calibration and is better, rtn needs no data (default: %(default)s)",
    )
    data = parser.add_argument_group("calibration (method gptq)")
    data.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text like that which the model will see, best the training set: .txt, or .jsonl "
        "with text, messages, prompt + completion, question + answer or instruction + output",
    )
    data.add_argument(
        "--samples", type=at_least(1), default=128, help="windows (default: %(default)s)"
    )
    data.add_argument(
        "--seq-len",
        type=at_least(2),
        help="tokens in a window (default: 512, or the model's limit)",
    )
    data.add_argument(
        "--seed", type=int, default=0, help="of the choice of windows (default: %(default)s)"
    )
    form = parser.add_argument_group("result")
    form.add_argument(
        "--zero-points",
        choices=("real", "integer"),
        help="real is more exact; integer can also be written as stock GPTQ, and merged exactly "
        "with adapt=scales (default: real; integer with --format gptq)",
    )
    form.add_argument(
        "--offsets-at",
        choices=("middle", "minimum"),
        default="middle",
        help="which weight of a group fp16 holds, the one at the middle code or at code 0; "
        f"{OFFSETS_AT_HELP}. Takes 2 bytes a group more in memory (default: %(default)s)",
    )
    form.add_argument(
        "--format",
        choices=("qalora", "gptq", "gptq_v2"),
        default="qalora",
        help="gptq and gptq_v2: stock checkpoints that AutoGPTQ and GPTQModel run "
        "(default: %(default)s)",
    )
    form.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="NAME",
        help="a layer that stays in 16 bits (whole name, last part, or a pattern with *); may be "
        "repeated. What is outside the blocks (embeddings, lm_head) always does",
    )
    form.add_argument(
        "--override",
        action="append",
        default=[],
        type=_override,
        metavar="NAME=bits:B,group_size:G",
        help="another grid for some layers, e.g. '*.down_proj=bits:8'; may be repeated",
    )
    solver = parser.add_argument_group("solver")
    solver.add_argument(
        "--desc-act",
        action="store_true",
        help="act-order: round inputs by size, groups scattered (stored as g_idx)",
    )
    solver.add_argument(
        "--ordering",
        choices=("groups", "none"),
        help="without --desc-act: larger groups first, or as they come (default: groups)",
    )
    solver.add_argument(
        "--no-mse", dest="mse", action="store_false", help="do not search clipped ranges"
    )
    solver.add_argument(
        "--damp", type=fraction, default=0.01, help="damping of the Hessian (default: %(default)s)"
    )
    solver.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the activations (default: the model's)",
    )
    solver.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the model brings"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run it; progress goes to stderr, the result to stdout."""
    import torch

    from ..quantize.pipeline import quantize_model

    _check(args)
    result = quantize_model(
        args.model,
        args.out,
        bits=args.bits,
        group_size=args.group_size,
        method=args.method,
        calibration=args.calibration,
        samples=args.samples,
        seq_len=args.seq_len,
        seed=args.seed,
        zero_points=args.zero_points,
        offsets_at=args.offsets_at,
        format=args.format,
        desc_act=args.desc_act,
        ordering=args.ordering or "groups",
        mse=args.mse,
        damp=args.damp,
        dynamic=dict(args.override),
        modules_to_not_convert=args.keep or None,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        device=args.device,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    if args.json:
        print(json.dumps({**dataclasses.asdict(result), "out": str(result.out)}))
        return 0
    errors = {n: layer["error"] for n, layer in result.layers.items() if layer["error"] is not None}
    print(f"{result.out}: {len(result.layers)} layers in {args.bits} bits")
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        mean = sum(errors.values()) / len(errors)
        print(f"relative error on calibration: mean {mean:.2e}, {errors[worst]:.2e} in {worst}")
    print(f"in 16 bits: {', '.join(result.kept) or 'no linear layer'}", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that would be ignored, in the command line's words."""
    if args.method == "gptq" and args.calibration is None:
        raise ConfigError(
            "GPTQ needs text: give --calibration FILE (.txt or .jsonl, best the training set; a "
            "few hundred kilobytes are enough), or --method rtn, which is less exact"
        )
    if args.method == "rtn":
        for option in ("calibration", "desc_act", "ordering"):
            if getattr(args, option):
                raise ConfigError(
                    f"--{option.replace('_', '-')} is for --method gptq, found rtn: leave out one "
                    "of the two"
                )
    if args.desc_act and args.ordering:
        raise ConfigError(
            "--desc-act has an order of its own, by size: leave out one of it and --ordering"
        )
    note_what_gguf_cannot_hold(args)
