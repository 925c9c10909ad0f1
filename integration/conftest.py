"""Fixtures that run scripts inside the environments of other systems."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """Put the files that start other systems first: they are the long ones, and of two processes
    none should wait for the other's last file."""
    starting = {item.path for item in items if "env_python" in item.fixturenames}
    items.sort(key=lambda item: item.path not in starting)


@pytest.fixture(scope="session")
def env_python():
    """`env_python("gptqmodel")` -> interpreter of that environment, built on first use."""

    @cache
    def interpreter(name):
        builder = ROOT / "integration" / "envs" / "build.py"
        done = subprocess.run([sys.executable, builder, name], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            pytest.fail(f"environment '{name}' could not be built; pip's message is above")
        return Path(done.stdout.strip())

    return interpreter


@pytest.fixture(scope="session")
def project_source(tmp_path_factory):
    """Copy of what this project is built from: setuptools leaves build/ behind, and takes from it
    what was removed since."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "qalora_command.py"):
        shutil.copy(ROOT / name, source)
    for name in ("qalora_plugin", "kernels"):
        shutil.copytree(ROOT / name, source / name)
    return source


@pytest.fixture(scope="session")
def project_path(project_source, tmp_path_factory):
    """Folder with this project installed as a user gets it (wheel, no dependencies), to be put on
    the PYTHONPATH of an environment that has the dependencies."""
    target = tmp_path_factory.mktemp("project")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", target, project_source], check=True)
    return target


@pytest.fixture(scope="session")
def run_python():
    """`run_python(python, *arguments, timeout=600, **environment)` -> its stdout."""

    def run(python, *arguments, timeout=600, **env):
        command = [str(python), *map(str, arguments)]
        offline = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONPATH": ""}
        environment = {**os.environ, **offline, **{k: str(v) for k, v in env.items()}}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT
        )
        if done.returncode:
            tail = (done.stdout + done.stderr)[-4000:]
            pytest.fail(f"{' '.join(command)} exited with {done.returncode}:\n{tail}")
        return done.stdout

    return run


@pytest.fixture(scope="session")
def run_json(run_python):
    """`run_json(...)`, arguments as those of `run_python` -> the last line of stdout, as JSON."""
    return lambda *args, **kwargs: json.loads(run_python(*args, **kwargs).strip().splitlines()[-1])


@pytest.fixture(scope="module")
def programs(env_python):
    """`programs(name, **environment)` -> `run(program, ...)`: its stdout.

    The programs of an environment, with the same variables, run in one process (programs.py).
    """
    with contextlib.ExitStack() as running:

        @cache
        def start(name, **environment):
            command = [env_python(name), "-P", ROOT / "integration" / "programs.py"]
            variables = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""} | environment
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process = subprocess.Popen(command, env=variables, cwd=ROOT, **pipes)
            running.enter_context(process)

            def run(*line):
                line = [str(part) for part in line]
                print(json.dumps(line), file=process.stdin, flush=True)
                answer = process.stdout.readline()
                assert answer, f"{line}: its process ended; what it said is above"
                found = json.loads(answer)
                if found["status"]:
                    pytest.fail(f"{line}: {found['status']}\n{found['stderr'][-4000:]}")
                return found["stdout"]

            return run

        yield start


@pytest.fixture(scope="module")
def command_line(programs, project_path):
    """`command_line(name)` -> `run("export", ...)`: stdout of this project's command there."""
    return lambda name: partial(programs(name, PYTHONPATH=str(project_path)), "qalora_plugin")
