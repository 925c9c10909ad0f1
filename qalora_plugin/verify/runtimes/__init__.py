"""Run an export in the runtime that it is for, and compare what it computes with our logits.

Each `run_*.py` is a program of its own that imports its runtime and nothing of this package; it is
run as one, by the interpreter that has the runtime. A crash of a runtime is then its own, and stock
libraries are stock.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ...checkpoint.config import QALoRAQuantConfig
from ...errors import CheckpointError, VerificationError
from ...formats.torchao import write as torchao
from ...hf.load import load_model
from ...merge.plan import MergePlan, plan_merge
from ..logits import added
from .rounding import rounded

ROWS, TOKENS = 2, 24
# of a logit, in units of the logits' spread where that is more than one
TOLERANCE = 1e-4
# llama.cpp's logits against those of rounded activations, both as distances from ours
LLAMA_CPP_SHARE = 3.0


@dataclass(frozen=True)
class Runtime:
    """How a format is run.

    Args:
        title: of the runtime.
        script: in this directory.
        modules: what its interpreter needs; of alternatives in one entry, one.
        install: what to install.
    """

    title: str
    script: str
    modules: tuple[tuple[str, ...], ...]
    install: str


RUNTIMES = {
    "gguf": Runtime("llama.cpp", "run_llama_cpp.py", (("xllamacpp",),), "xllamacpp"),
    "mlx": Runtime("mlx-lm", "run_mlx.py", (("mlx_lm",),), "'mlx[cpu]' mlx-lm"),
    "onnx": Runtime("ONNX Runtime", "run_onnx.py", (("onnxruntime",),), "onnxruntime-genai"),
    "torchao": Runtime(
        "stock transformers",
        "run_transformers.py",
        (("transformers",), ("torchao",)),
        "transformers torchao",
    ),
    "lora": Runtime("stock PEFT", "run_transformers.py", (("peft",), ("torchao",)), "peft torchao"),
    "gptq": Runtime(
        "GPTQModel or AutoGPTQ", "run_gptq.py", (("gptqmodel", "auto_gptq"),), "gptqmodel"
    ),
}


@dataclass(frozen=True)
class RuntimeReport:
    """What a runtime computed.

    Args:
        runtime: its name.
        not_run: why it did not run, or None.
        difference: from ours: the largest of a logit; for llama.cpp, whose activations are rounded,
            the root mean square of log-probabilities.
        allowed: what it may be.
    """

    runtime: str
    not_run: str | None = None
    difference: float | None = None
    allowed: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def as_text(self) -> str:
        """One line for people."""
        if self.not_run is not None:
            return f"not run: {self.not_run}"
        what = "log-probabilities (rms)" if self.runtime == "llama.cpp" else "logits"
        return (
            f"run in {self.runtime}: {what} differ from ours by {self.difference:.1e}, "
            f"allowed {self.allowed:.1e}"
        )


def check_runtime(
    exported: Path,
    against: str | Path,
    format: str,
    python: str | Path | None = None,
    base: str | Path | None = None,
) -> RuntimeReport:
    """Run random tokens through the runtime and through our model in fp32.

    Args:
        exported: what `export_model` wrote.
        against: the merged model; for a lora export the adapter.
        format: of the export.
        python: interpreter that has the runtime, by default this one.
        base: for a lora export, the adapter's base; by default what its config names.

    Raises:
        VerificationError: the runtime fails, or its logits are others.
    """
    runtime, interpreter = RUNTIMES[format], str(python or sys.executable)
    missing = _missing(runtime, interpreter)
    if missing is not None:
        return RuntimeReport(runtime.title, missing)
    with tempfile.TemporaryDirectory(prefix="qalora-verify-") as scratch:
        run = _Run(runtime, interpreter, exported, Path(scratch))
        if format == "lora":
            return _check_lora(run, against, base)
        return _check(run, against, format)


@dataclass
class _Run:
    """One export in one runtime."""

    runtime: Runtime
    python: str
    exported: Path
    scratch: Path

    def __call__(self, ids: torch.Tensor, *arguments: Path) -> dict[str, torch.Tensor]:
        """The output for `ids`; `arguments` are the model and what else the script takes."""
        given, out = self.scratch / "input.safetensors", self.scratch / "out.safetensors"
        save_file({"input_ids": ids}, given)
        model, *rest = arguments or (self.exported,)
        script = Path(__file__).with_name(self.runtime.script)
        command = [self.python, "-P", *map(str, (script, model, given, out, *rest))]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment())
        if done.returncode or not out.exists():
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise VerificationError(
                f"{self.exported}: {self.runtime.title} cannot run it (exit status "
                f"{done.returncode}):\n{tail}"
            )
        return load_file(out)

    def report(self, difference: torch.Tensor, allowed: float) -> RuntimeReport:
        """Judge a difference.

        Raises:
            VerificationError: it is more than allowed, or not finite.
        """
        found = difference.item()
        if not found <= allowed:
            raise VerificationError(
                f"{self.exported}: {self.runtime.title} computes something else: its output is "
                f"{found:.3g} from ours, allowed {allowed:.3g}. Export again; if that does not "
                "help, report it with the versions of both."
            )
        return RuntimeReport(self.runtime.title, None, found, allowed)


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def _missing(runtime: Runtime, python: str) -> str | None:
    """What keeps the runtime from running there, or None."""
    code = (
        "import importlib.util as u, json, sys; "
        "print(json.dumps([any(map(u.find_spec, names)) for names in json.loads(sys.argv[1])]))"
    )
    try:
        done = subprocess.run(
            [python, "-c", code, json.dumps(runtime.modules)], capture_output=True, text=True
        )
    except OSError as error:
        raise VerificationError(f"{python}: cannot be run ({error.strerror}).") from error
    if done.returncode:
        raise VerificationError(f"{python}: is no Python interpreter: {done.stderr.strip()}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    lacking = [
        " or ".join(names) for names, there in zip(runtime.modules, found, strict=True) if not there
    ]
    if not lacking:
        return None
    return (
        f"{runtime.title} is not installed (no module {', '.join(lacking)}); pip install "
        f"{runtime.install}, here or where --python names an interpreter"
    )


def _check(run: _Run, against: str | Path, format: str) -> RuntimeReport:
    source = open_quantized(against)
    model, ids = load_ours(source), random_ids(source.reader.config)
    expected = _logits(model, ids)
    if format == "gguf":
        found, ours = run(ids)["logprobs"], expected[:, -1].log_softmax(-1)
        with rounded(model, run.exported, source):
            effect = _rms(_logits(model, ids)[:, -1].log_softmax(-1) - ours)
        return run.report(_rms(found - ours), TOLERANCE + LLAMA_CPP_SHARE * effect.item())
    outputs = run(ids)
    allowed = TOLERANCE * _spread(expected)
    if "generated" in outputs:
        run.report(_below_best(model, ids[0], outputs["generated"]), allowed)
    return run.report((outputs["logits"] - expected).abs().max(), allowed)


def _below_best(model: torch.nn.Module, ids: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """By how much the logits of greedily generated tokens are at most below our largest."""
    logits = _logits(model, torch.cat([ids, generated])[None])[0, len(ids) - 1 : -1]
    chosen = logits.gather(1, generated[:, None]).squeeze(1)
    return (logits.amax(1) - chosen).max()


def _check_lora(run: _Run, adapter: str | Path, base_of: str | Path | None) -> RuntimeReport:
    """The adapter in stock PEFT, on the base in stock transformers (through torchao)."""
    plan: MergePlan = plan_merge(adapter, base_of)
    base = run.scratch / "base"
    try:
        torchao.export(plan.base.directory, base, progress=None)
    except CheckpointError as error:
        return RuntimeReport(run.runtime.title, f"stock transformers cannot hold its base: {error}")
    model, ids = load_ours(plan.base), random_ids(plan.base.reader.config)
    with added(model, plan, plan.convention):
        expected = _logits(model, ids)
    found = run(ids, base, run.exported)["logits"]
    return run.report((found - expected).abs().max(), TOLERANCE * _spread(expected))


def load_ours(source: QuantizedCheckpoint) -> torch.nn.Module:
    """The model in fp32, whether it is stored in our format or as stock GPTQ."""
    options = {}
    if source.is_foreign:
        own = QALoRAQuantConfig(source.config.bits, source.config.group_size)
        options["quantization_config"] = own
    return load_model(source.directory, **options)


def random_ids(config: dict[str, Any]) -> torch.Tensor:
    """Token ids int64 [ROWS, TOKENS]."""
    size = config.get("text_config", config)["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, size, (ROWS, TOKENS), generator=generator)


@torch.no_grad()
def _logits(model: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.float()


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().mean().sqrt()


def _spread(logits: torch.Tensor) -> float:
    return max(1.0, logits.std().item())
