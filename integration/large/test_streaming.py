"""Large models in bounded memory: 1.1B quantized and merged, a 7B GGUF file there and back."""

import json
import os
import shutil
import sys
import time

import pytest
from support.peak import peak_of

from .models import write_adapter

QUANTIZE_LIMIT = 2.5e9
MERGE_LIMIT = 1.0e9
TIME_LIMIT = 3  # of the time that copying the file takes

QUANTIZE = """
import sys, torch
from qalora_plugin import quantize_model
ids = torch.randint(0, 32000, (4, 256), generator=torch.Generator().manual_seed(0))
quantize_model(sys.argv[1], sys.argv[2], bits=4, group_size=32, calibration=ids, samples=4,
               seq_len=256)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_1b_is_quantized_and_merged_in_bounded_memory(tmp_path, llama_1b):
    quantized, adapter, merged = (tmp_path / name for name in ("int4", "adapter", "merged"))
    assert peak_of("quantize", "-c", QUANTIZE, llama_1b, quantized) <= QUANTIZE_LIMIT
    write_adapter(quantized, adapter)
    command = ["-m", "qalora_plugin", "merge", adapter, "--out", merged]
    assert peak_of("merge", *command) <= MERGE_LIMIT


def _copy_seconds(source, target):
    """Copy a file and sync it, through this process's memory, and return how long it took."""
    started = time.monotonic()
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, 1 << 24)
        os.fsync(writing.fileno())
    return time.monotonic() - started


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_7b_gguf_in_bounded_memory_and_time(gguf_7b, tmp_path):
    copied = _copy_seconds(gguf_7b, tmp_path / "copy.gguf")
    print(json.dumps({"step": "copy", "gb": gguf_7b.stat().st_size / 1e9, "seconds": copied}))
    (tmp_path / "copy.gguf").unlink()
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    qalora = ("-m", "qalora_plugin")
    back = ("--format", "original", "--out", tmp_path / "again.gguf")
    started = time.monotonic()
    assert peak_of("import", *qalora, "import", gguf_7b, "--out", base) <= MERGE_LIMIT
    assert time.monotonic() - started <= TIME_LIMIT * copied
    write_adapter(base, adapter)
    assert peak_of("merge", *qalora, "merge", adapter, "--out", merged) <= MERGE_LIMIT
    shutil.rmtree(base)
    started = time.monotonic()
    assert peak_of("write back", *qalora, "export", merged, *back) <= MERGE_LIMIT
    assert time.monotonic() - started <= TIME_LIMIT * copied
    assert (tmp_path / "again.gguf").stat().st_size == gguf_7b.stat().st_size
