"""Headers of GGUF files: counts of what is not there, and where a block has floats."""

import gguf
import numpy as np
import pytest
from support.gguf_files import write_gguf

from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.errors import CheckpointError
from qalora_plugin.formats.gguf.headers import HALVES

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


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_where_the_floats_of_a_block_lie(kind):
    quant, found = gguf.GGMLQuantizationType[kind], set()
    size = gguf.GGML_QUANT_SIZES[quant][1]
    for place in range(0, size - 1, 2):
        block = np.zeros((1, size), np.uint8)
        block[0, place : place + 2] = (0x00, 0x7C)  # infinity in f16
        if not np.isfinite(gguf.quants.dequantize(block, quant)).all():
            found.add(place)
    assert found == set(HALVES[kind])
