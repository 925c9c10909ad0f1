"""Values that several subcommands take, checked where argparse can name the option."""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

from qalora_kernels import SUPPORTED_BITS, QuantSpec

from .say import say


def _parser(kind: type, accepts: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """Return a function that parses what argparse gives it, or says what was expected."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
        return value

    return parse


def at_least(least: int, *also: int) -> Callable[[str], int]:
    """Return a parser of integers from `least` on, and of those in `also`."""
    other = "".join(f", or {allowed}" for allowed in also)
    expected = f"an integer of {least} or more{other}"
    return _parser(int, lambda value: value >= least or value in also, expected)


bits = _parser(int, SUPPORTED_BITS.__contains__, "2, 3, 4 or 8")
group_size = at_least(1, -1)
fraction = _parser(float, lambda value: 0 < value < 1, "a number between 0 and 1")


def add_no_hash_check(parser: argparse.ArgumentParser) -> None:
    """Add the option that leaves hashes out, for models so large that reading them twice hurts."""
    about = (
        "do not compare files with the hashes in the manifests beside them; sizes and configs "
        "still are"
    )
    parser.add_argument("--no-hash-check", action="store_true", help=about)


OFFSETS_AT_HELP = (
    "minimum is for llama.cpp: `qalora export --format gguf` is then bit for bit what was trained, "
    "up to 4 bits in groups that are a multiple of 32 (other layers become F16 there)"
)


def note_what_gguf_cannot_hold(args: argparse.Namespace) -> None:
    """Say on stderr where `--offsets-at minimum` does not serve what it is for."""
    from ..checkpoint.format import format_named

    if args.offsets_at != "minimum" or args.bits == "auto":  # which then chooses 4 at most
        return
    grids = format_named("gguf").grids
    (block,) = grids.blocks or ()
    inputs = math.lcm(abs(args.group_size), block)  # whole groups in whole blocks, if these fit
    spec = QuantSpec(args.bits, args.group_size, inputs, out_features=1)
    desc_act = getattr(args, "desc_act", False)  # not every command has it
    if grids.obstacle(spec, desc_act):
        order = " in act-order" if desc_act else ""
        say(
            f"qalora: note: --offsets-at minimum is of no use with {args.bits} bits and groups of "
            f"{args.group_size}{order}: GGUF holds up to 4 bits in contiguous groups that are a "
            f"multiple of {block}, other layers become F16",
            file=sys.stderr,
        )
