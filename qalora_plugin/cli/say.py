"""Print for people: what comes from files is shown, and not sent to the terminal as it is."""

import os
import sys
from typing import Any, TextIO

from ..errors import printable


def say(text: Any, file: TextIO | None = None) -> None:
    """Print a line, or several, with control characters escaped; by default on stdout.

    Where the reader of a pipe has gone (`qalora inspect DIR | head`) the rest goes nowhere.
    """
    file = file or sys.stdout
    try:
        print(printable(str(text)), file=file, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
