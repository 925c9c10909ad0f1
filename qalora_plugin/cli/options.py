"""Values that several subcommands take, checked where argparse can name the option."""

import argparse
import math
import sys
from collections.abc import Callable

from qalora_kernels import SUPPORTED_BITS, QuantSpec


def bits(text: str) -> int:
    """A width of `SUPPORTED_BITS`."""
    if text not in map(str, SUPPORTED_BITS):
        *first, last = map(str, SUPPORTED_BITS)
        raise argparse.ArgumentTypeError(f"expected {', '.join(first)} or {last}, found {text!r}")
    return int(text)


def at_least(least: int, *also: int) -> Callable[[str], int]:
    """Integers from `least` on, and those in `also`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or (value < least and value not in also):
            other = "".join(f", or {allowed}" for allowed in also)
            raise argparse.ArgumentTypeError(
                f"expected an integer of {least} or more{other}, found {text!r}"
            )
        return value

    return number


group_size = at_least(1, -1)


def fraction(text: str) -> float:
    """A number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, found {text!r}")
    return value


OFFSETS_AT_HELP = (
    "minimum is for llama.cpp: `qalora export --format gguf` is then bit for bit what was trained, "
    "up to 4 bits in groups that are a multiple of 32 (other layers become F16 there)"
)


def note_what_gguf_cannot_hold(args: argparse.Namespace) -> None:
    """Say on stderr where `--offsets-at minimum` does not serve what it is for.

    Args:
        args: with `offsets_at`, `bits`, `group_size`, and `desc_act` where the command has it.
    """
    from ..checkpoint.format import format_named

    if args.offsets_at != "minimum":
        return
    grids = format_named("gguf").grids
    (block,) = grids.blocks or ()
    inputs = math.lcm(abs(args.group_size), block)  # whole groups in whole blocks, if these fit
    spec = QuantSpec(args.bits, args.group_size, inputs, out_features=1)
    if grids.obstacle(spec, getattr(args, "desc_act", False)):
        order = " in act-order" if getattr(args, "desc_act", False) else ""
        print(
            f"qalora: note: --offsets-at minimum is of no use with {args.bits} bits and groups of "
            f"{args.group_size}{order}: GGUF holds up to 4 bits in contiguous groups that are a "
            f"multiple of {block}, other layers become F16",
            file=sys.stderr,
        )
