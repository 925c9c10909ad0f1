"""CheckpointReader: what it reads, and what it refuses."""

import json
import os
import resource
import sys
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from qalora_plugin.errors import CheckpointError
from qalora_plugin.files import reader as reader_module
from qalora_plugin.files.hub import _HUB_PATTERNS, resolve_model_dir
from qalora_plugin.files.names import INDEX_FILE
from qalora_plugin.files.reader import CheckpointReader, all_finite
from qalora_plugin.files.safetensors import DTYPES

FLOAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path, header, data, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + raw + data)


def shards(directory, weight_map, files):
    for file, names in files.items():
        save_file({name: torch.ones(2) for name in names}, directory / file)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def test_reads_every_dtype_as_safetensors_writes_it(tmp_path):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2, (4, 16), dtype=torch.uint8, generator=generator)
    tensors = {code: raw.view(getattr(torch, name)).clone() for code, (name, _) in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    assert set(reader.tensors) == set(tensors)
    for name, expected in tensors.items():
        found = reader.get(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        raw = bytes(expected.reshape(-1).view(torch.uint8))
        assert bytes(found.reshape(-1).view(torch.uint8)) == raw
        assert b"".join(reader.chunks(name)) == raw
    assert reader.get("scalar").item() == 3.5


def test_chunks_are_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "COPY_BYTES", 7)
    save_file({"w": torch.arange(5)}, tmp_path / "model.safetensors")
    pieces = [bytes(chunk) for chunk in CheckpointReader(tmp_path).chunks("w")]
    assert [len(piece) for piece in pieces] == [7, 7, 7, 7, 7, 5]
    assert b"".join(pieces) == bytes(torch.arange(5).view(torch.uint8))


class _Slow(FileIO):
    """A file of a file system that gives less than it is asked for, as some over a network do."""

    def readinto(self, view):
        return super().readinto(memoryview(view)[:3])


def test_files_that_are_read_in_little_pieces(tmp_path, monkeypatch):
    values = torch.arange(5) / 3
    save_file({"w": values}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: _Slow(path, mode))
    assert torch.equal(reader.get("w"), values)
    assert [bytes(chunk) for chunk in reader.finite_chunks("w")] == [values.numpy().tobytes()]


def test_shards_and_links_as_in_the_hub_cache(tmp_path):
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shards(
        blobs,
        {"a": "x.safetensors", "b": "y.safetensors"},
        {"x.safetensors": ["a"], "y.safetensors": ["b"]},
    )
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    reader = CheckpointReader(snapshot)
    assert [path.name for path in reader.files] == ["x.safetensors", "y.safetensors"]
    assert torch.equal(reader.get("b"), torch.ones(2))


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "at least 8 bytes"),
    "huge header length": (lambda p: write(p, b"{}", b"", 1 << 60), "at most 100000000"),
    "header beyond the file": (lambda p: write(p, b"{}", b"", 5000), "truncated"),
    "not JSON": (lambda p: write(p, b"[1,", b""), "not JSON"),
    "not text": (lambda p: write(p, b"\xff\xfe", b""), "not JSON"),
    "deep nesting": (lambda p: write(p, b"[" * 200_000, b""), "not JSON"),
    "not an object": (lambda p: write(p, b"[]", b""), "must be an object"),
    "metadata not an object": (lambda p: write(p, {"__metadata__": 3}, b""), "__metadata__"),
    "duplicate name": (
        lambda p: write(p, b'{"a":' + json.dumps(FLOAT).encode() + b',"a":{}}', b"\0" * 8),
        "appears twice",
    ),
    "no offsets": (lambda p: write(p, {"a": {"dtype": "F32", "shape": [2]}}, b""), "missing"),
    "negative size": (lambda p: write(p, {"a": {**FLOAT, "shape": [-2]}}, b"\0" * 8), "shape"),
    "huge size": (
        lambda p: write(p, {"a": {**FLOAT, "shape": [0, 1 << 63], "data_offsets": [0, 0]}}, b""),
        "not a list of sizes",
    ),
    "unknown dtype": (lambda p: write(p, {"a": {**FLOAT, "dtype": "F4"}}, b"\0" * 8), "'F4'"),
    "wrong span": (lambda p: write(p, {"a": {**FLOAT, "shape": [3]}}, b"\0" * 8), "takes 12 bytes"),
    "truncated data": (lambda p: write(p, {"a": FLOAT}, b"\0" * 7), "truncated: expected"),
    "trailing data": (lambda p: write(p, {"a": FLOAT}, b"\0" * 9), "no tensor owns"),
    "hole": (
        lambda p: write(p, {"a": FLOAT, "b": {**FLOAT, "data_offsets": [12, 20]}}, b"\0" * 20),
        "tensor b follows a hole",
    ),
    "overlap": (
        lambda p: write(p, {"a": FLOAT, "b": {**FLOAT, "data_offsets": [4, 12]}}, b"\0" * 12),
        "tensor b overlaps",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_by_name(case, tmp_path):
    damage, message = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        CheckpointReader(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", 3],
)
def test_weight_map_cannot_leave_the_directory(shard, tmp_path):
    inner = tmp_path / "model"
    inner.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (inner / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=r"bare name|weight_map\.a: expected a valid string"):
        CheckpointReader(inner)


def test_weight_map_to_a_pickle_is_refused(tmp_path):
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model.bin"}}))
    with pytest.raises(CheckpointError, match=r"only \.safetensors"):
        CheckpointReader(tmp_path)


INDEXES = {
    "missing shard": ({"a": "x", "b": "z"}, {"x": ["a"]}, "z.safetensors: missing"),
    "key in two shards": ({"a": "x", "b": "y"}, {"x": ["a"], "y": ["a", "b"]}, "also in x"),
    "key in another shard": ({"a": "x", "b": "y"}, {"x": ["a", "b"], "y": ["c"]}, "places in y"),
    "key not in the index": ({"a": "x"}, {"x": ["a", "b"]}, "places in no shard"),
    "key not in its shard": ({"a": "x", "b": "x"}, {"x": ["a"]}, "does not hold it"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_index_must_agree_with_the_shards(case, tmp_path):
    weight_map, files, message = INDEXES[case]
    shards(
        tmp_path,
        {name: f"{shard}.safetensors" for name, shard in weight_map.items()},
        {f"{shard}.safetensors": names for shard, names in files.items()},
    )
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', '{"weight_map": {}}', "\xff"])
def test_damaged_index(text, tmp_path):
    (tmp_path / INDEX_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=INDEX_FILE):
        CheckpointReader(tmp_path)


def test_directories_without_weights_say_what_they_are(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        CheckpointReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="never read"):
        CheckpointReader(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="this is an adapter"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        CheckpointReader(tmp_path / "none")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    reader = CheckpointReader(tmp_path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        reader.get("a")
    with pytest.raises(CheckpointError, match="no tensor b"):
        reader.get("b")


def test_resolve_model_dir(tmp_path, monkeypatch):
    assert resolve_model_dir(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    for name in (str(tmp_path / "file"), "./none", "a/b/c", tmp_path / "none"):
        with pytest.raises(CheckpointError, match="not a directory"):
            resolve_model_dir(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="the Hub did not give it"):
        resolve_model_dir("qalora-tests/no-such-model")


def test_licences_come_from_the_hub_with_a_model():
    names = ["LICENSE.txt", "NOTICE", "model.safetensors", "chat_template.jinja", "model.bin"]
    found = filter_repo_objects(names, allow_patterns=_HUB_PATTERNS)
    assert list(found) == names[:-1]


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_falls_after_every_tensor(tmp_path):
    save_file({f"w{i}": torch.ones(4 << 20) for i in range(8)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    before = resident_mib()
    for name in reader.tensors:
        reader.get(name).sum()
    assert resident_mib() - before < 40  # of 128 read


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 40, 77])
def test_one_number_that_is_not_finite_is_found_anywhere(dtype, bad, place):
    values = torch.linspace(-9, 9, 78).to(dtype)
    assert all_finite(values) and all_finite(values[:0])
    values[place] = bad
    assert not all_finite(values)
