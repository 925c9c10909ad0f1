"""One SFTTrainer run, on one or several CPU ranks: torchrun --nproc_per_node N train.py JOB_JSON

JOB: the fields of `Job`. Rank 0 writes `out/result.json`. Accelerate has several CPU ranks, or
DeepSpeed or FSDP on accelerators, but not both; it is told otherwise here. The rest is TRL's,
Accelerate's and DeepSpeed's own.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import accelerate.state
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from qalora_plugin import MergeCallback, QALoRAConfig, QALoRAQuantConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "deepspeed"
ACCELERATE = ROOT / "recipes" / "accelerate"
ZERO = {"zero2": "zero2.json", "zero3": "zero3.json", "zero3_offload": "zero3_offload.json"}
SHARDED = (*ZERO, "fsdp2")
GLOBAL_BATCH = 4


@dataclass
class Job:
    """What to run.

    Args:
        base: quantized base, or a 16-bit one that is quantized while it loads.
        out: output_dir.
        mode: "ddp" (or one rank), or one of SHARDED.
        steps: of training.
        merged: where to merge to, or None.
        save_steps: a checkpoint every so many steps; 0 for none.
        adapt: as in QALoRAConfig.
        resume: checkpoint to go on from.
        warm_start: adapter to start from, with a new optimizer.
        reference: keep a frozen copy of it beside it, "ref", as TRL's preference trainers do.
        kill: [rank, step]: that rank kills itself with SIGKILL after that step.
        kill_merge: rank 0 kills itself when all of the merge is written but not in its place.
        quantize: 4 to quantize a 16-bit base while it loads.
        settings: further settings of SFTConfig.
    """

    base: str
    out: str
    mode: str
    steps: int = 20
    merged: str | None = None
    save_steps: int = 0
    adapt: str = "zeros"
    resume: str | None = None
    warm_start: str | None = None
    reference: bool = False
    kill_merge: bool = False
    quantize: int = 0
    kill: list[int] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


class Kill(TrainerCallback):
    """Kills one rank with SIGKILL after a step."""

    def __init__(self, rank, step):
        self.rank, self.step = rank, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


class KilledMerge(MergeCallback):
    """Kills rank 0 with SIGKILL at the end of its merge."""

    def _finish(self, partial):
        super()._finish(partial)
        os.kill(os.getpid(), signal.SIGKILL)


def use_cpu_ranks(mode):
    """Let Accelerate run DeepSpeed and FSDP on CPU ranks over gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and mode == "ddp":
        return
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    if mode != "fsdp2":
        return
    plain = accelerate.state.AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    accelerate.state.AcceleratorState.__init__ = with_fsdp


def mode_settings(mode):
    """Return the settings of SFTConfig for a mode, from the recipes."""
    if mode in ZERO:
        config = json.loads((RECIPES / ZERO[mode]).read_text())
        if config["zero_optimization"]["stage"] == 3:
            # small parameters would all stay whole, and hide what sharding does
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return {"deepspeed": config}
    if mode == "fsdp2":
        config = yaml.safe_load((ACCELERATE / "fsdp2.yaml").read_text())["fsdp_config"]
        return {"fsdp": True, "fsdp_config": config}
    return {}


def rows():
    """Return the first of the quickstart's pairs."""
    lines = (ROOT / "recipes" / "quickstart" / "pairs.jsonl").read_text().splitlines()[:128]
    pairs = [json.loads(line) for line in lines]
    return Dataset.from_list([{"text": pair["prompt"] + pair["completion"]} for pair in pairs])


def make_trainer(job):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {
        "output_dir": job.out,
        "max_steps": job.steps,
        "per_device_train_batch_size": GLOBAL_BATCH // world,
        "learning_rate": 1e-3,
        "max_length": 48,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "steps" if job.save_steps else "no",
        "save_steps": job.save_steps or 500,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32", "device_map": None},
        **mode_settings(job.mode),
        **job.settings,
    }
    merging = KilledMerge if job.kill_merge else MergeCallback
    callbacks: list[TrainerCallback] = [merging(job.merged)] if job.merged else []
    if job.kill:
        callbacks.append(Kill(*job.kill))
    arguments = SFTConfig(**settings)  # before any model: it says how models are loaded
    if job.quantize:
        grid = QALoRAQuantConfig(bits=job.quantize, group_size=32)
        arguments.model_init_kwargs["quantization_config"] = grid
    model: Any = job.base
    if job.warm_start:
        base = AutoModelForCausalLM.from_pretrained(job.base, **arguments.model_init_kwargs)
        model = PeftModel.from_pretrained(base, job.warm_start, is_trainable=True)
        if job.reference:
            model.add_adapter("ref", model.peft_config["default"])
            for name, parameter in model.named_parameters():
                if ".default." in name:
                    copy = model.get_parameter(name.replace(".default.", ".ref."))
                    copy.data.copy_(parameter.data)
    return SFTTrainer(
        model,
        args=arguments,
        train_dataset=rows(),
        processing_class=AutoTokenizer.from_pretrained(job.base),
        peft_config=None
        if job.warm_start
        else QALoRAConfig(r=4, lora_alpha=8, adapt=job.adapt, task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )


def run(job):
    """Train as the job says, in this rank."""
    use_cpu_ranks(job.mode)
    trainer = make_trainer(job)
    kind = trainer.accelerator.distributed_type.value  # at the end of training it is forgotten
    trainer.train(resume_from_checkpoint=job.resume)
    if trainer.is_world_process_zero():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found = {"losses": losses, "ranks": trainer.args.world_size, "kind": kind}
        Path(job.out, "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(Job(**json.loads(sys.argv[1])))
