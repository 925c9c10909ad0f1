"""The progress of long work, on stderr: a bar with rate and time left, plain lines in a log."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {rate_fmt}, {elapsed} passed, {remaining} left"
_SECONDS = 10  # between two lines of a log


class _Lines:
    """A stream that turns what tqdm draws over and over into lines."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_meter(description: str, unit: str, **options: Any) -> Any:
    """Return a tqdm bar, to be used in a `with` block; work that takes no second shows nothing.

    Args:
        description: of the work, such as "merging".
        unit: what is counted, in the singular.
        options: of tqdm, such as `total` and `disable`.
    """
    from tqdm import tqdm

    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "bar_format": _LINE, "mininterval": _SECONDS}
    return tqdm(desc=description, unit=unit, delay=1, dynamic_ncols=True, **options)


@contextmanager
def progress_bar(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show progress while the block runs; yields `progress(done, total)`, which moves it."""
    with progress_meter(description, unit) as meter:

        def progress(done: int, total: int) -> None:
            meter.total = total
            meter.update(done - meter.n)

        yield progress
