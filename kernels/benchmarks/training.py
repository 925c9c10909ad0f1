"""Training: a decoder layer in this process; whole steps and SFTTrainer, a process a variant."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import torch
import worker
from measure import Row
from worker import Spec

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / "integration" / "envs" / "build.py"
TOKENIZER = ROOT / "qalora_plugin" / "quickstart" / "base_model"
WARM_UP = 2  # steps
# variant -> the module that it needs, and the environment of integration/envs that has it
PEER_NEEDS = {
    "use_qalora": ("gptqmodel", "gptqmodel"),
    "use_qalora_fp32": ("gptqmodel", "gptqmodel"),
    "qlora_nf4": ("bitsandbytes", "axolotl"),
}


# ---- whole steps


class Unavailable(RuntimeError):
    """A variant cannot run here, or no longer; the message says why."""


def _interpreter(variant: str) -> str:
    """Return the python that can run a variant: this one, or that of a built environment."""
    module, environment = PEER_NEEDS.get(variant, ("torch", ""))
    if importlib.util.find_spec(module) is not None:
        return sys.executable
    spec = importlib.util.spec_from_file_location("build_environment", ENVIRONMENTS)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    directory = build.environment_dir(environment)
    if not (directory / build.STAMP).exists():
        command = f"python integration/envs/build.py {environment}"
        raise Unavailable(f"{module} is not installed, nor its environment built: {command}")
    return str(directory / "bin" / "python")


class Worker:
    """A process of `worker.py` that runs one variant; `ready` is its first answer."""

    def __init__(self, variant: str, spec: Spec):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        settings = {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"}
        arguments = json.dumps(spec | {"variant": variant})
        self.process = subprocess.Popen(
            [_interpreter(variant), "-W", "ignore", str(HERE / "worker.py"), arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=tempfile.gettempdir(),  # GPTQModel writes logs into the working directory
            env=os.environ | settings,
        )
        self.ready = self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["no output"])[-1]
            raise Unavailable(f"exit status {self.process.returncode}: {last}")
        values = json.loads(line)
        if "error" in values:
            raise Unavailable(values["error"])
        return values

    def ask(self, command: str) -> dict[str, Any]:
        """Return the answer to `time` or `memory`."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.communicate()
        self.log.close()


def steps(name: str, spec: Spec, variants: list[str], rounds: int) -> Iterator[Row]:
    """Measure a forward and a backward of a small model, the variants of `worker` in turn.

    Yields:
        Rows: one a variant, one a ratio "qalora / variant", one for each that cannot run.
    """
    base: Row = {"operator": name}
    common: Row = {"dtype": "bfloat16", "M": spec["batch"] * spec["sequence"], "step": spec}
    workers: dict[str, Worker] = {}
    times: measure.Times = {variant: [] for variant in variants}
    more: dict[str, Row] = {}
    for command in ["start"] + ["time"] * (WARM_UP + rounds) + ["memory"]:
        for variant in list(times):
            try:
                if command == "start":
                    workers[variant] = Worker(variant, spec | {"task": "step"})
                    more[variant] = common | {"rounds": rounds} | workers[variant].ready
                elif command == "time":
                    times[variant].append(workers[variant].ask("time")["seconds"])
                else:
                    more[variant] |= workers[variant].ask("memory")
                    workers[variant].close()
            except Unavailable as reason:
                del times[variant]
                yield base | {"variant": variant, "not_run": str(reason)}
    yield from measure.rows_of(base, {v: times[v][WARM_UP:] for v in times}, more)


# ---- SFTTrainer


def planned_bytes(model: str, spec: Spec) -> dict[str, int]:
    """Return what `qalora plan` says that a GPU allocates, by variant."""
    sizes = {"bits": spec["bits"], "group-size": spec["group_size"], "r": spec["r"]}
    sizes |= {"seq-len": spec["sequence"], "micro-batch": spec["batch"]}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, "-P", "-m", "qalora_plugin", "plan", model, "--json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    methods = json.loads(done.stdout)["methods"]
    parts = {name: method["memory"] for name, method in methods.items()}
    # "runtime" is CUDA's context, which `max_memory_allocated` does not see
    planned = {name: sum(p.values()) - p.get("runtime", 0) for name, p in parts.items()}
    return planned | {"qlora_nf4": planned["qlora"]}


def sft(name: str, spec: Spec, variants: list[str], rounds: int) -> Iterator[Row]:
    """Train a random Llama with SFTTrainer, quantized while it loads, one variant after the other.

    Yields:
        Rows as `steps` does, each as soon as its variant has taken its `rounds` steps.

    Raises:
        SystemExit: after the last row, where QA-LoRA did not run, a trained tensor of a variant had
            no gradient, or a loss did not fall.
    """
    base: Row = {"operator": f"SFT {name}", "M": spec["batch"] * spec["sequence"]}
    given = {"task": "sft", "tokenizer": str(TOKENIZER), "rounds": rounds}
    times: measure.Times = {}
    wrong = []
    with tempfile.TemporaryDirectory() as model:
        worker.random_llama(spec).save_pretrained(model)
        planned = planned_bytes(model, spec)
        for variant in variants:
            try:
                process = Worker(variant, spec | given | {"model": model})
            except Unavailable as reason:
                yield base | {"variant": variant, "not_run": str(reason)}
                wrong += [f"qalora: {reason}"] if variant == "qalora" else []
                continue
            process.close()
            row = {"training": spec, "rounds": rounds} | process.ready
            times[variant] = row.pop("seconds")
            row["peak_over_plan"] = round(row["peak_bytes"] / planned[variant], 3)
            rates = [base["M"] / seconds for seconds in times[variant]]
            row |= measure.spread(rates, "tokens_per_second")
            yield from measure.rows_of(base, {variant: times[variant]}, {variant: row})
            if row["without_gradient"]:
                wrong.append(f"{variant}: no gradient reaches {row['without_gradient']}")
            if row["last_loss"] >= row["first_loss"]:
                wrong.append(f"{variant}: loss {row['first_loss']}, then {row['last_loss']}")
    yield from measure.ratios(base, times)
    if wrong:
        sys.exit("; ".join(wrong))


# ---- a decoder layer


def layer_functions(spec: Spec, hidden: torch.Tensor) -> measure.Functions:
    """Return forward and backward of a decoder layer, and of its seven projections alone.

    Gradients reach their inputs, as in a deep model.
    """
    llama = worker.build(spec)
    base = next(module for module in llama.modules() if hasattr(module, "rotary_emb"))
    (decoder,) = base.layers
    positions = base.rotary_emb(hidden, torch.arange(spec["sequence"], device=hidden.device)[None])
    projections = [m for name, m in decoder.named_modules() if name.endswith("_proj")]
    widths = {w for m in projections for w in (m.in_features, m.out_features)}
    like = {"device": hidden.device, "dtype": hidden.dtype}
    rows = {w: torch.randn(*hidden.shape[:-1], w, **like) for w in widths}

    def whole() -> None:
        decoder.zero_grad()
        y = decoder(hidden.detach().requires_grad_(), position_embeddings=positions)
        (y[0] if isinstance(y, tuple) else y).backward(hidden)

    def linears() -> None:
        decoder.zero_grad()
        for module in projections:
            x = rows[module.in_features].detach().requires_grad_()
            module(x).backward(rows[module.out_features])

    whole()
    return {"decoder layer": whole, "linears of the layer": linears}


def layer(spec: Spec, variants: list[str], rounds: int) -> Iterator[Row]:
    """Measure `layer_functions` as a trainer calls them ("timing": "eager") and as a CUDA graph.

    The "frozen" projections as a graph are the bare products. Yields rows as `steps` does.
    """
    device = spec["device"]
    shape = (spec["batch"], spec["sequence"], spec["hidden"])
    hidden = torch.randn(shape, device=device, dtype=torch.bfloat16)
    base: Row = {"M": spec["batch"] * spec["sequence"], "rounds": rounds}
    base |= {key: spec[key] for key in ("bits", "group_size", "r", "hidden", "intermediate")}
    built: dict[str, measure.Functions] = {}
    for name in variants:
        try:
            built[name] = layer_functions(spec | {"variant": name}, hidden)
        except Exception as error:  # a peer's failure is a result
            if name in ("qalora", "frozen"):
                raise
            reason = {"variant": name, "not_run": measure.first_line(error)}
            yield {"operator": "decoder layer"} | base | reason
    for timing in ("eager", "graph"):
        for operator in ("decoder layer", "linears of the layer"):
            row = {"operator": operator, "timing": timing} | base
            timed: measure.Functions = {}
            for name, functions in built.items():
                try:
                    graph = timing == "graph"
                    call = functions[operator]
                    timed[name] = measure.graphed(call, 1, device) if graph else call
                except Exception as error:
                    yield row | {"variant": name, "not_run": measure.first_line(error)}
            times = measure.interleave(timed, rounds, device)
            yield from measure.rows_of(row, times, {name: {} for name in timed})
