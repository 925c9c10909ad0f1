"""What is printed reaches a terminal, a file or a pipe, or nobody."""

import os
import sys

from qalora_plugin.cli.say import say


def test_a_reader_that_has_gone_is_no_error(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does when it has seen enough
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        say("one line")
        say("another line")
