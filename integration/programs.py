"""Run programs one after the other in one process: starting Python takes longer than most of them.

Each line of stdin is a program, a file or the name of a module, and its arguments: a JSON list. A
line of JSON answers it: `status`, and what the program printed, `stdout` and `stderr`.
"""

import contextlib
import io
import json
import os
import runpy
import sys
import traceback

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print by themselves is no answer
here, path = os.getcwd(), list(sys.path)
for line in sys.stdin:
    sys.argv = json.loads(line)
    is_file = sys.argv[0].endswith(".py")
    sys.path[:] = [os.path.dirname(sys.argv[0]), *path] if is_file else path
    run = runpy.run_path if is_file else runpy.run_module
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            run(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        except Exception:
            traceback.print_exc()
            status = 1
    os.chdir(here)
    found = {"status": status, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}
    print(json.dumps(found), file=answers, flush=True)
