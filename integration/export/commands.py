"""Run `qalora` command lines in one process: starting Python takes longer than most of them.

Each line of stdin is a command's arguments, a JSON list; a line of JSON answers it: `status`, and
what the command printed, `stdout` and `stderr`.
"""

import contextlib
import io
import json
import sys
import traceback

import qalora_command

qalora_command.running = True
from qalora_plugin.cli import main  # noqa: E402

answers = sys.stdout
for line in sys.stdin:
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            status = main(json.loads(line))
        except SystemExit as stop:
            status = stop.code
        except Exception:
            traceback.print_exc()
            status = 1
    found = {"status": status, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}
    print(json.dumps(found), file=answers, flush=True)
