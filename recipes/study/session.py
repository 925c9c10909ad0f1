"""One call of a script of the study: it makes the runs that its data file lacks, until it is time.

Each run is appended to the data file and is never made again, so a script may be stopped at any
time and started again.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import transformers
from rows import Row, add_row, read_rows

Make = Callable[[Path], Iterable[Row]]
"""Makes one run, given the folder of quantized bases, and returns its rows."""


def options(description: str, rows: Path) -> argparse.ArgumentParser:
    """Return a parser of the options that every script has; `rows` is the default data file."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run later")
    parser.add_argument("--bases", type=Path, help="folder that keeps the quantized bases")
    parser.add_argument("--rows", type=Path, default=rows, help="the data file")
    return parser


def work(arguments: argparse.Namespace, next_run: Callable[[list[Row]], Make | None]) -> int:
    """Make runs until `next_run`, given all rows so far, has none left or the time is up.

    Returns:
        Exit status: 0, or 3 if runs are left.
    """
    transformers.logging.disable_progress_bar()
    begun, path = time.monotonic(), arguments.rows
    with tempfile.TemporaryDirectory() as scratch:
        while make := next_run(read_rows(path)):
            if time.monotonic() - begun > arguments.seconds:
                print("more runs to make: start this command again")
                return 3
            for row in make(arguments.bases or Path(scratch)):
                print(json.dumps(row), flush=True)
                add_row(path, row)
    return 0
