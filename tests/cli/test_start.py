"""The command answers at once: nothing heavy is imported where headers and JSON suffice."""

import json
import subprocess
import sys
from pathlib import Path

from qalora_plugin import quantize_model
from qalora_plugin.cli import COMMANDS, main

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
HEAVY = {"torch", "transformers", "peft", "trl", "accelerate", "datasets"}
_COMMAND = """
import sys
from qalora_command import main
try:
    status = main()
except SystemExit as end:
    status = end.code
print(*sys.modules, sep="\\n", file=sys.stderr)
sys.exit(status)
"""


def modules(*arguments, start=("-c", _COMMAND), status=0):
    """Return what `qalora ARGUMENTS` imports."""
    command = [sys.executable, *start, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    return set(done.stderr.splitlines())


def test_help_imports_nothing_heavy():
    for command in ((), *((name,) for name in COMMANDS)):
        assert modules(*command, "--help") & HEAVY == set()


def test_inspect_imports_nothing_heavy(base_dir, dense_dir):
    for found in (base_dir, dense_dir, FIXTURES / "use_qalora_adapter"):
        assert modules("inspect", "--quick", str(found)) & HEAVY == set()


def test_where_hashes_hold_no_value_is_read(dense_dir, tmp_path, capsys):
    made = quantize_model(dense_dir, tmp_path / "made", method="rtn", progress=False).out
    assert modules("inspect", str(made)) & HEAVY == set()
    assert "torch" in modules("inspect", "--values", str(made))
    assert main(["inspect", str(made), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["hashes_checked"], found["values_read"]) == (True, False)
    (made / "qalora_manifest.json").unlink()
    assert main(["inspect", str(made), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["hashes_checked"], found["values_read"]) == (False, True)


def test_run_as_a_module_it_is_the_command_too():
    start = ("-X", "importtime", "-m", "qalora_plugin")
    lines = modules("--help", start=("-m", "qalora_plugin"))
    assert lines == set()
    slow = modules("--help", start=start)  # not recognized as the command: right, only slower
    assert any(line.split("|")[-1].strip() == "torch" for line in slow)


def test_a_command_that_loads_models_registers(tmp_path):
    found = modules("merge", str(tmp_path), "--out", "x", status=1)
    assert {"qalora_plugin.hf.quantizer", "qalora_plugin.tuner.register"} <= found


def test_importing_the_package_registers():
    code = (
        "import qalora_plugin\n"
        "from peft import PeftType\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'qalora' in AUTO_QUANTIZER_MAPPING and PeftType('QALORA')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
