"""The parser of the command line: argparse, with the nearest right word for a wrong one.

argparse starts in a few milliseconds, and an option of an export is a field of its format's record,
so there is little that typer or click would take over; shtab completes what argparse knows.
"""

import argparse
import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

_SHELLS = ("bash", "zsh", "tcsh")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors of wrong words name the nearest right ones."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and remember what was given; what nobody knows is an error of the subcommand."""
        self._given = sys.argv[1:] if args is None else args
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            where = ""
            if self._subparsers and any(word.startswith("-") for word in unknown):
                where = " (options of a command stand after its name)"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{where}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print the message with what may have been meant, and exit with status 2.

        The usage of a command with thirty options would hide the message: its name is enough.
        """
        pairs = [(word, self._nearest(word)) for word in self._given]
        meant = [f"{near} instead of {word}" for word, near in pairs if near]
        message = f"{message}. Did you mean {', '.join(meant)}?" if meant else message
        hint = f"`{self.prog} --help` lists what it takes."
        self.exit(2, f"{self.prog}: error: {message}\n{hint}\n")

    def _nearest(self, given: str) -> str | None:
        """Return the word that a misspelt option, or a misspelt choice, is close to."""
        word = given.partition("=")[0]
        options = [option for action in self._actions for option in action.option_strings]
        choices = [str(choice) for action in self._actions for choice in action.choices or ()]
        known = options if word.startswith("-") else choices
        if word in known or any(option.startswith(word) for option in options):
            return None
        near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
        return near[0] if near else None


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser, and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action.choices, dict):
            for subparser in action.choices.values():
                yield from _actions(subparser)


class PrintCompletion(argparse.Action):
    """The option --print-completion SHELL: print the script for a shell, and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, **keywords: Any) -> None:
        super().__init__(option_strings, dest, choices=_SHELLS, **keywords)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        """Print and exit, as --help does."""
        import shtab

        for action in _actions(parser):
            if action.choices is None and action.nargs != 0 and action.type in (None, Path):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell=values))
        parser.exit()
