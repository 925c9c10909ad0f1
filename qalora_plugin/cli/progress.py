"""The progress bar of long commands, on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the block runs; yields `progress(done, total)`, which moves it."""
    from tqdm import tqdm

    with tqdm(desc=description, unit=unit, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
