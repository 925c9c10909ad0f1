"""Run an export in the runtime that it is for, and compare what it computes with our logits.

`run.py` of each format's folder is a program of its own that imports its runtime and nothing of
this package; it is run as one, by the interpreter that has the runtime. A crash of a runtime is
then its own, and stock libraries are stock.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ..architecture.model import auto_class_names
from ..checkpoint.checkpoint import open_quantized
from ..checkpoint.format import Format, Runtime, format_named
from ..errors import CheckpointError, VerificationError
from ..files.json import write_json
from ..hf.load import load_model
from ..merge.plan import plan_merge
from .logits import added, logits_of, random_ids, trained_class, vocabulary

ROWS, TOKENS = 2, 24
# of a logit, in units of the logits' spread where that is more than one
TOLERANCE = 1e-4
# logits of a runtime that rounds activations against those of our model with activations so
# rounded, both as distances from ours
ROUNDING_SHARE = 3.0


@dataclass(frozen=True)
class RuntimeReport:
    """The numbers that a runtime computed, beside ours.

    Args:
        runtime: its name.
        not_run: why it did not run, or None.
        difference: of `quantity` from ours: the largest, or what `quantity` says.
        allowed: what it may be.
        quantity: what differs, for people.
    """

    runtime: str
    not_run: str | None = None
    difference: float | None = None
    allowed: float | None = None
    quantity: str = "logits"

    def as_text(self) -> str:
        """Return one line for people."""
        if self.not_run is not None:
            return f"not run: {self.not_run}"
        return (
            f"run in {self.runtime}: {self.quantity} differ from ours by {self.difference:.1e}, "
            f"allowed {self.allowed:.1e}"
        )


def check_runtime(
    exported: Path,
    against: str | Path,
    format: Format,
    python: str | Path | None = None,
    base: str | Path | None = None,
) -> RuntimeReport:
    """Run random tokens through the runtime and through our model in fp32; see `verify_export`.

    Raises:
        VerificationError: the runtime fails, or its logits are others.
    """
    interpreter = str(python or sys.executable)
    missing = _missing(format.runtime, interpreter)
    if missing is not None:
        return RuntimeReport(format.runtime.title, missing)
    with tempfile.TemporaryDirectory(prefix="qalora-verify-") as scratch:
        run = _Run(format, interpreter, exported, Path(scratch))
        return _check_adapter(run, against, base) if format.of_adapter else _check(run, against)


def answers(
    exported: Path, prompts: list[list[int]], tokens: int, python: str | Path | None = None
) -> list[str] | None:
    """Let llama.cpp answer prompts, greedily.

    Args:
        exported: a GGUF file.
        prompts: token ids of each.
        tokens: of an answer, at most.
        python: interpreter that has the runtime, by default this one.

    Returns:
        The answers; None where the runtime is not installed.

    Raises:
        VerificationError: the runtime fails.
    """
    format, interpreter = format_named("gguf"), str(python or sys.executable)
    if _missing(format.runtime, interpreter) is not None:
        return None
    with tempfile.TemporaryDirectory(prefix="qalora-answers-") as scratch:
        asked = Path(scratch) / "asked.json"
        write_json(asked, {"prompts": prompts, "answer_tokens": tokens})
        run = _Run(format, interpreter, exported, Path(scratch))
        printed = run.start(torch.tensor([prompts[0][:1]]), exported, asked)[1]
    found: list[str] = json.loads(printed.strip().splitlines()[-1])["answers"]
    return found


@dataclass
class _Run:
    """One export in one runtime."""

    format: Format
    python: str
    exported: Path
    scratch: Path

    def __call__(self, ids: torch.Tensor, model: Path, *arguments: Path) -> dict[str, torch.Tensor]:
        """Return what the runtime computes; `arguments` are what else its program takes."""
        return self.start(ids, model, *arguments)[0]

    def start(
        self, ids: torch.Tensor, model: Path, *arguments: Path
    ) -> tuple[dict[str, torch.Tensor], str]:
        """Return what the runtime computes, and what its program prints."""
        given, out = self.scratch / "input.safetensors", self.scratch / "out.safetensors"
        save_file({"input_ids": ids}, given)
        command = [self.python, "-P", self.format.script, model, given, out, *arguments]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            errors="replace",  # what a crash prints may be anything
            env=environment,
            stdin=subprocess.DEVNULL,  # nothing may be asked there
        )
        if done.returncode or not out.exists():
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise VerificationError(
                f"{self.exported}: {self.format.runtime.title} cannot run it (exit status "
                f"{done.returncode}):\n{tail}"
            )
        return load_file(out), done.stdout

    def report(
        self, difference: torch.Tensor, allowed: float, quantity: str = "logits"
    ) -> RuntimeReport:
        """Judge a difference.

        Raises:
            VerificationError: it is more than allowed, or not finite.
        """
        found, title = difference.item(), self.format.runtime.title
        if not found <= allowed:
            raise VerificationError(
                f"{self.exported}: {title} computes something else: its output is {found:.3g} from "
                f"ours, allowed {allowed:.3g}. Export again; if that does not help, report it with "
                "the versions of both."
            )
        return RuntimeReport(title, None, found, allowed, quantity)


def _missing(runtime: Runtime, python: str) -> str | None:
    """Say what keeps the runtime from running there; None if nothing does."""
    code = (
        "import importlib.util as u, json, sys; print(json.dumps("
        "[names for names in json.loads(sys.argv[1]) if not any(map(u.find_spec, names))]))"
    )
    try:
        done = subprocess.run(
            [python, "-c", code, json.dumps(runtime.modules)],
            capture_output=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise VerificationError(f"{python}: cannot be run ({error.strerror}).") from error
    if done.returncode:
        raise VerificationError(f"{python}: is no Python interpreter: {done.stderr.strip()}")
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise VerificationError(
            f"{python}: is no Python interpreter: expected what it was asked to print, found "
            f"{done.stdout!a:.80}. Name one with --python."
        ) from error
    lacking = [" or ".join(names) for names in found]
    if not lacking:
        return None
    return (
        f"{runtime.title} is not installed (no module {', '.join(lacking)}); pip install "
        f"{runtime.install}, here or where --python names an interpreter"
    )


def _unfit(class_name: str | None, config: dict[str, Any]) -> str | None:
    """Say why a model is not run: its class is not that of a causal language model."""
    causal = auto_class_names(AutoModelForCausalLM, config.get("model_type"))
    if class_name is None or class_name in causal:
        return None
    return f"only causal language models are run there, and this is a {class_name}"


def _check(run: _Run, against: str | Path) -> RuntimeReport:
    source, format = open_quantized(against), run.format
    named = next(iter(source.reader.config.get("architectures") or ()), None)
    unfit = _unfit(named, source.reader.config)
    if unfit is not None:
        return RuntimeReport(format.runtime.title, unfit)
    model = load_model(source)
    ids = random_ids(model, ROWS, TOKENS)
    expected, found = logits_of(model, ids), run(ids, run.exported)
    if format.runtime.rounds_activations:
        ours = expected[:, -1].log_softmax(-1)
        with format.module("weights").rounded(model, run.exported, source):
            effect = _rms(logits_of(model, ids)[:, -1].log_softmax(-1) - ours)
        allowed = TOLERANCE + ROUNDING_SHARE * effect.item()
        return run.report(_rms(found["logprobs"] - ours), allowed, "log-probabilities (rms)")
    allowed = TOLERANCE * _spread(expected)
    if "generated" in found:
        run.report(_below_best(model, ids[0], found["generated"]), allowed)
    return run.report((found["logits"] - expected).abs().max(), allowed)


def _below_best(model: torch.nn.Module, ids: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """Return by how much at most greedily generated tokens are below our largest logit."""
    logits = logits_of(model, torch.cat([ids, generated])[None])[0, len(ids) - 1 : -1]
    chosen = logits.gather(1, generated[:, None]).squeeze(1)
    return (logits.amax(1) - chosen).max()


def _check_adapter(run: _Run, adapter: str | Path, base: str | Path | None) -> RuntimeReport:
    """Compare an adapter in its runtime, on a base exported for that, with base and adapter."""
    plan, written = plan_merge(adapter, base), run.scratch / "base"
    unfit, size = _unfit(trained_class(plan), plan.config), vocabulary(plan.config)
    if size != vocabulary(plan.base.reader.config):
        unfit = f"the adapter has {size} tokens, and its base has to be resized to that before"
    if unfit is not None:
        return RuntimeReport(run.format.runtime.title, unfit)
    assert run.format.runtime.on is not None  # every record of an adapter's format says it
    base_format = format_named(run.format.runtime.on)
    try:
        base_format.module("write").export(plan.base.directory, written, progress=None)
    except CheckpointError as error:
        why = f"{base_format.runtime.title} cannot hold its base: {error}"
        return RuntimeReport(run.format.runtime.title, why)
    model = load_model(plan.base)
    ids = random_ids(model, ROWS, TOKENS)
    with added(model, plan, None if plan.adapter.is_ours else plan.convention):
        expected = logits_of(model, ids)
    found = run(ids, written, run.exported)["logits"]
    return run.report((found - expected).abs().max(), TOLERANCE * _spread(expected))


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().mean().sqrt()


def _spread(logits: torch.Tensor) -> float:
    return max(1.0, logits.std().item())
