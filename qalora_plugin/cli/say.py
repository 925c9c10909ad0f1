"""Print for people: what comes from files is shown, and not sent to the terminal as it is."""

import sys
from typing import Any, TextIO

from ..errors import printable


def say(text: Any, file: TextIO | None = None) -> None:
    """Print a line, or several, with control characters escaped; by default on stdout."""
    print(printable(str(text)), file=file or sys.stdout, flush=True)
