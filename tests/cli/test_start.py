"""The command answers at once: nothing heavy is imported where headers and JSON suffice."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
from safetensors.torch import load_file, save_file
from support.gguf_files import write_gguf

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


def test_inspect_imports_nothing_heavy(base_dir, dense_dir, tmp_path):
    for found in (base_dir, dense_dir):
        assert modules("inspect", "--quick", str(found)) & HEAVY == set()
    names = ("use_qalora_adapter", "gptq_4bit_g128_actorder_asym", "mlx_4bit_g32_bf16_mixed")
    names += ("awq_4bit_g32_asym", "ct_4bit_g32_asym", "autoround_4bit_g32_asym")
    gguf = write_gguf(tmp_path / "model.gguf")
    for path in (gguf, *(FIXTURES / name for name in names)):
        assert modules("inspect", str(path)) & HEAVY == set(), path


def test_inspect_finds_infinity_without_torch(tmp_path, capsys):
    path = write_gguf(tmp_path / "model.gguf", kinds={"ffn_down": "Q8_0", "ffn_up": "Q4_K"})
    [tensor] = [t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight"]
    data = bytearray(path.read_bytes())
    last_block = int(tensor.data_offset + tensor.n_bytes) - 34
    data[last_block : last_block + 2] = b"\x00\x7c"  # d in f16
    path.write_bytes(data)
    assert main(["inspect", str(path)]) == 1
    assert "blk.1.ffn_down.weight holds NaN or infinity" in capsys.readouterr().out
    mlx = shutil.copytree(FIXTURES / "mlx_4bit_g32_bf16_mixed", tmp_path / "mlx")
    tensors = load_file(mlx / "model.safetensors")
    tensors["model.embed_tokens.biases"][3, 1] = float("nan")
    save_file(tensors, mlx / "model.safetensors", {"format": "mlx"})
    assert main(["inspect", str(mlx)]) == 1
    assert "model.embed_tokens.biases holds NaN or infinity" in capsys.readouterr().out


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
