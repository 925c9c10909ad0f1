"""Merged models, and vLLM on the CPU in its own environment with this project beside it."""

import json

import pytest
from support.served import merged_quickstart

from qalora_plugin import QALoRAQuantConfig

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # small models; threads that wait take a core
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture(scope="session")
def vllm_environment(project_path):
    """The environment variables of a process that runs vLLM with this project's plugin."""
    return ENVIRONMENT | {"PYTHONPATH": str(project_path)}


@pytest.fixture(scope="session")
def generate(env_python, run_python, tmp_path_factory, vllm_environment):
    """`generate(jobs, **environment)` -> one result a job, see generate.py."""

    def run(jobs, **environment):
        folder = tmp_path_factory.mktemp("generate")
        given, out = folder / "jobs.json", folder / "out.json"
        given.write_text(json.dumps(jobs))
        script = "integration/vllm/generate.py"
        environment = vllm_environment | environment
        run_python(env_python("vllm"), script, given, out, timeout=1500, **environment)
        return json.loads(out.read_text())

    return run


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """The folder of the quickstart's base, adapter and merged model, 4 bits in groups of 32."""
    config = QALoRAQuantConfig(bits=4, group_size=32)
    return merged_quickstart(tmp_path_factory.mktemp("quickstart"), config)
