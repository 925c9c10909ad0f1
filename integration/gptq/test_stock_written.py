"""Stock GPTQ directories that we write run in AutoGPTQ 0.7.1 and GPTQModel 5.8.0."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAQuantConfig, quantize_model
from qalora_plugin.quickstart.data import base_model_path, calibration_texts

RUN = Path(__file__).resolve().parents[1] / "peers" / "run_gptq.py"
TOLERANCE = {"autogptq": 1e-5, "gptqmodel": 2e-3}  # GPTQModel dequantizes to fp16 here


@pytest.mark.parametrize(("bits", "desc_act"), [(2, False), (4, False), (4, True), (8, False)])
def test_engines_compute_what_we_compute(
    bits: int,
    desc_act: bool,
    env_python: Callable[[str], Path],
    run_json: Callable[..., Any],
    tmp_path: Path,
) -> None:
    stock = tmp_path / "stock"
    quantize_model(
        base_model_path(),
        stock,
        bits=bits,
        group_size=32,
        method="gptq",
        calibration=calibration_texts(),
        samples=8,
        seq_len=128,
        zero_points="integer",
        format="gptq",
        desc_act=desc_act,
    )
    ids = torch.randint(0, 2048, (2, 64), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, tmp_path / "input.safetensors")
    model = AutoModelForCausalLM.from_pretrained(
        stock, dtype=torch.float32, quantization_config=QALoRAQuantConfig(bits=bits, group_size=32)
    )
    with torch.no_grad():
        ours = model(input_ids=ids).logits
    for engine, tolerance in TOLERANCE.items():
        out = tmp_path / f"{engine}.safetensors"
        arguments = [stock, tmp_path / "input.safetensors", out, "--engine", engine]
        run_json(env_python(engine), RUN, *arguments)
        theirs = load_file(out)["logits"]
        error = (theirs - ours).norm() / ours.norm()
        assert error <= tolerance, f"{engine}: relative error {error:.2e}"
