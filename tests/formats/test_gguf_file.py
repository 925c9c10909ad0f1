"""Headers of GGUF files that count what is not there."""

import pytest
from support.gguf_files import write_gguf

from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.errors import CheckpointError

HOSTILE_COUNTS = {
    "key-values": (16, 2**63),
    "tensors": (8, 2**40),
    "length of the first key": (24, 2**62),
}


@pytest.mark.parametrize("case", HOSTILE_COUNTS)
def test_counts_that_no_file_has_are_refused_at_once(case, tmp_path):
    path = write_gguf(tmp_path / "model.gguf")
    at, number = HOSTILE_COUNTS[case]
    raw = bytearray(path.read_bytes())
    raw[at : at + 8] = number.to_bytes(8, "little")
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        open_quantized(path)


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63])
def test_an_array_longer_than_its_file_is_refused_at_once(length, tmp_path):
    path = write_gguf(tmp_path / "model.gguf")
    raw = path.read_bytes()
    at = raw.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    path.write_bytes(raw[:at] + length.to_bytes(8, "little") + raw[at + 8 :])
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        open_quantized(path)
