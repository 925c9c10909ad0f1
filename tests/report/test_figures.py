"""The figures of a run."""

import multiprocessing
import subprocess
import sys

from qalora_plugin.report.figures import peak_memory

OTHER = "peak of a program that it started"
GROW = "import sys; x = b'x' * int(sys.argv[1])"


def _peaks(results):
    found = []
    for more in (None, 200_000_000):
        size = peak_memory()["peak of the process"] + more if more else 0
        subprocess.run([sys.executable, "-c", GROW, str(size)], check=True)
        found.append(peak_memory().get(OTHER, 0) - size)
    results.put(found)


def test_the_peak_of_a_program_is_not_that_of_this_process():
    """The system says of a child at least what its parent had when it was started."""
    fork = multiprocessing.get_context("fork")  # which has had no children
    results = fork.Queue()
    fork.Process(target=_peaks, args=(results,)).start()
    small, large = results.get(timeout=60)
    assert small == 0 and 0 <= large < 100_000_000
