"""Runs of the real Axolotl, shared by the tests of this folder."""

import itertools
import json
import os
import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STOCK = ROOT / "tests" / "fixtures" / "gptq_4bit_g128_actorder_asym"


@dataclass(frozen=True)
class Axolotl:
    """The environment, as a user has it: its programs on PATH, this project installed."""

    python: Path
    environment: dict[str, str]
    work: Path

    def log(self, name):
        """Return the directory of a run's output."""
        return self.work / f"{name}.log"

    def start(self, name, *command):
        """Start a program of the environment at the project's root."""
        with self.log(name).open("wb") as file:
            return subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def run(self, name, *command):
        """Run one to its end and return its output; fail the test where it fails."""
        process = self.start(name, *command)
        try:
            code = process.wait(900)
        finally:
            process.kill()
        text = self.log(name).read_text(errors="replace")
        if code:
            pytest.fail(f"{command} exited with {code}:\n{text[-4000:]}")
        return text

    def verify(self, out):
        """Return what `qalora verify` finds of a run's merged directory."""
        command = [self.python, "-m", "qalora_plugin", "verify", out / "merged", "--adapter", out]
        report = self.run(f"verify-{out.name}", *command, "--json")
        return json.loads(report[report.index("{") :])


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("axolotl")


@pytest.fixture(scope="session")
def axolotl(env_python, project_path, work):
    python = env_python("axolotl")
    environment = os.environ | {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(project_path),
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
    }
    return Axolotl(python, environment, work)


@pytest.fixture(scope="session")
def small(work):
    """The quickstart recipe with 48 rows and 3 steps, each of which is saved."""
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    rows = (ROOT / recipe["datasets"][0]["path"]).read_text().splitlines()[:48]
    (work / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    recipe["datasets"][0]["path"] = str(work / "pairs.jsonl")
    recipe["base_model"] = str(ROOT / recipe["base_model"])
    recipe["qalora"]["calibration_samples"] = 4
    recipe |= {
        "dataset_prepared_path": str(work / "prepared"),
        "sequence_len": 256,
        "micro_batch_size": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        # Axolotl keeps 4 by itself, and would drop the checkpoint that is resumed from by name
        "save_total_limit": 1000,
    }
    path = work / "small.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="session")
def killed(axolotl, work, small):
    """A run that SIGKILL ended at a random moment after its second checkpoint; the seed of the
    moment is printed."""
    out = work / "killed"
    command = ["axolotl", "train", small, "--launcher", "python", "--max-steps", 500]
    process = axolotl.start("killed", *command, "--output-dir", out)
    deadline = time.monotonic() + 300
    while not (out / "checkpoint-2" / "trainer_state.json").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(axolotl.log("killed").read_text(errors="replace")[-4000:])
        time.sleep(0.05)
    seed = random.SystemRandom().randrange(1_000_000)
    print(f"moment of the kill: seed {seed}")
    time.sleep(random.Random(seed).uniform(0, 1.5))
    process.kill()
    process.wait()
    return out


@pytest.fixture(scope="session")
def even(work):
    """Settings of a run on rows of as many tokens each: Axolotl takes the mean of the ranks' means,
    and one rank that of all tokens."""
    colours = itertools.permutations((" red", " green", " blue", " black"))
    rows = [{"prompt": "colours:", "completion": "".join(order)} for order in colours]
    path = work / "even.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = {"field_instruction": "prompt", "field_output": "completion", "format": "{instruction}"}
    settings = {
        "datasets": [{"path": str(path), "ds_type": "json", "type": kind}],
        "val_set_size": 0,
        "micro_batch_size": 4,
        "learning_rate": 0.01,
        "qalora": {"quantize_method": "rtn", "quantized_model_dir": str(work / "even_bases")},
    }
    (work / "even.json").write_text(json.dumps(settings))
    return settings


@pytest.fixture(scope="session")
def driven(axolotl, work, small, killed, even):
    """What each step of drive.py left."""
    text = axolotl.run("driven", axolotl.python, HERE / "drive.py", small, STOCK, work)
    return json.loads(text.strip().splitlines()[-1])
