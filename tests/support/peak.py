"""The peak of resident memory of a Python process, read while it runs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def peak_of(step, *arguments, python=sys.executable, **environment):
    """Run Python, print how long it took, and return its peak of resident bytes.

    The peak is read while it runs: what `wait4` says of a child is no less than what this process
    had when it started the child.
    """
    started, peak = time.monotonic(), 0
    command = [str(part) for part in (python, *arguments)]
    process = subprocess.Popen(command, env=os.environ | environment)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = [line for line in status.splitlines() if line.startswith("VmHWM")]
        peak = int(found[0].split()[1]) * 1024 if found else peak  # a zombie has none
        time.sleep(0.02)
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"step": step, "peak_gb": peak / 1e9, "seconds": seconds}))
    assert process.returncode == 0
    return peak
