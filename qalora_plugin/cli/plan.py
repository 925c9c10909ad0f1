"""`qalora plan`: what a training run needs, from config.json alone."""

import argparse
import json
import math
import sys
from dataclasses import asdict, fields, replace
from typing import Any

from ..errors import ConfigError
from .options import bits, group_size
from .say import say


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "plan",
        help="say how much memory a training run needs, before it starts",
        description="Memory of one GPU by part, and sizes on disk, for QA-LoRA, LoRA (16-bit base) "
        "and QLoRA (NF4, double quantization) side by side. Reads config.json only: one training "
        "step of the model's own code runs on tensors without numbers. Counts the bytes that torch "
        "allocates; resident memory is more.",
        epilog="example: qalora plan meta-llama/Llama-3.1-8B --gpus 8 --zero 3 --seq-len 4096 "
        "--gradient-checkpointing",
    )
    parser.add_argument("model", metavar="MODEL", help="directory with config.json, or Hub id")
    base = parser.add_argument_group("base")
    base.add_argument("--bits", type=bits, help="2, 3, 4 or 8 (default: the model's own, or 4)")
    base.add_argument("--group-size", type=group_size, help="default: the model's own, or 32")
    adapter = parser.add_argument_group("adapter")
    keeps = "scales and both keep a layer's whole input for the backward"
    _add_setting(adapter, "adapt", keeps)
    _add_setting(adapter, "r", "rank")
    adapter.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="layers with an adapter (default: every linear layer of the blocks)",
    )
    run = parser.add_argument_group("run")
    _add_setting(run, "gpus", "number of processes")
    _add_setting(run, "zero", "DeepSpeed's ZeRO stage; 0 for none")
    offload = "to host memory: optimizer (ZeRO 2, 3), all: parameters too (ZeRO 3)"
    _add_setting(run, "offload", offload)
    _add_setting(run, "seq_len", "tokens in a row")
    _add_setting(run, "micro_batch", "rows on a GPU")
    run.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep the inputs of the blocks only",
    )
    _add_setting(run, "optimizer", "the states that it keeps for each trained parameter")
    _add_setting(run, "dtype", "of what is not quantized, and of autocast")
    _add_setting(run, "device", "where the run trains")
    run.add_argument(
        "--gpu-memory",
        type=float,
        nargs="+",
        metavar="GIB",
        help="sizes to say what fits on (default: 16 24 40 48 80 141; none with --device cpu)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the model brings"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on stdout, in bytes"
    )
    parser.set_defaults(func=main)


def _add_setting(group: Any, name: str, text: str) -> None:
    """Add the option of one of `PlanSettings`, with its default and its choices."""
    from ..plan.settings import CHOICES, PlanSettings

    default = getattr(PlanSettings, name)
    group.add_argument(
        "--" + name.replace("_", "-"),
        type=type(default),
        choices=CHOICES.get(name),
        default=default,
        help=f"{text} (default: %(default)s)",
    )


def main(args: argparse.Namespace) -> int:
    """Plan the run; the result goes to stdout."""
    from ..plan import PlanSettings, count_parameters, load_shape, plan
    from ..plan.memory import USUAL_GPU_MEMORY
    from ..plan.table import table

    sizes = tuple(args.gpu_memory or (USUAL_GPU_MEMORY if args.device == "cuda" else ()))
    bad = [size for size in sizes if not 0 < size < math.inf]
    if bad:
        raise ConfigError(f"--gpu-memory: expected GiB above 0, found {bad[0]:g}")
    chosen = {field.name: getattr(args, field.name) for field in fields(PlanSettings)}
    if args.target_modules is not None:
        chosen["target_modules"] = tuple(args.target_modules)
    settings = PlanSettings(**chosen)
    shape = load_shape(args.model, settings, args.revision, args.trust_remote_code)
    settings = replace(settings, bits=shape.base.bits, group_size=shape.base.group_size)
    plans = plan(shape, settings)
    total, active = count_parameters(shape, settings)
    if shape.max_tokens is not None and settings.seq_len > shape.max_tokens:
        say(
            f"qalora: note: the model takes {shape.max_tokens} tokens (max_position_embeddings), "
            f"planned for rows of {settings.seq_len}: give --seq-len",
            file=sys.stderr,
        )
    if args.json:
        found = {name: result.as_json(sizes) for name, result in plans.items()}
        counted = {"total": total, "active": active}
        found_all = {"settings": asdict(settings), "parameters": counted, "methods": found}
        say(json.dumps(found_all))
        return 0
    title = _title(args.model, settings)
    if active < total:
        title += f"\n{total / 1e9:.2f} B parameters, of which a token uses {active / 1e9:.2f} B"
    say(table(plans, settings, title, sizes))
    return 0


def _title(model: str, settings: Any) -> str:
    stage = f", ZeRO-{settings.zero}" if settings.zero else ""
    where = "process(es)" if settings.device == "cpu" else "GPU(s)"
    kept = "with" if settings.gradient_checkpointing else "without"
    return (
        f"{model}: INT{settings.bits}, groups of {settings.group_size}, "
        f"adapt={settings.adapt}, r={settings.r}; {settings.gpus} {where}{stage}, "
        f"{settings.micro_batch} x {settings.seq_len} tokens each, {settings.dtype}, "
        f"{kept} gradient checkpointing"
    )
