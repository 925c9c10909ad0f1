"""The `qalora` command's way in.

It lies outside the package, because importing that registers with transformers and PEFT, which
takes seconds that `--help` and `inspect` have no use for. So the command says here that it is
running, and registers when it comes to something that loads a model.
"""

import sys

running = sys.orig_argv[1:3] == ["-m", "qalora_plugin"]
"""Whether this process is the command: then `import qalora_plugin` registers nothing by itself."""


def main() -> int:
    """Run the command."""
    global running
    running = True
    from qalora_plugin.cli import main as run

    return run()
