"""Shards, index, hashes, and directories that appear whole or not at all."""

import json
import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qalora_plugin.errors import CheckpointError, OutputError
from qalora_plugin.files.atomic import AtomicDirectory, ScratchDirectory
from qalora_plugin.files.manifest import check_manifest, write_manifest
from qalora_plugin.files.names import INDEX_FILE, MANIFEST_FILE
from qalora_plugin.files.reader import CheckpointReader
from qalora_plugin.files.writer import CheckpointWriter, ShardWriter, split_plan

TENSORS = {
    "guard": torch.tensor([3.0], dtype=torch.float16),
    "odd": torch.arange(3, dtype=torch.uint8),
    "qweight": torch.arange(6, dtype=torch.int32).view(2, 3),
    "scales": torch.randn(3, 3).to(torch.bfloat16),
    "wide": torch.randn(5, dtype=torch.float64),
    "empty": torch.empty(0, 2),
    "scalar": torch.tensor(2.5),
    "strided": torch.arange(6.0).view(2, 3).t(),
}
PLAN = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def write_all(directory, plans):
    writer = CheckpointWriter(directory, plans)
    for index, plan in enumerate(plans):
        with writer.shard(index) as shard:
            for name in reversed(list(plan)):  # any order will do
                shard.write(name, TENSORS[name])
    writer.finish()
    write_manifest(directory)
    return writer


def test_safetensors_reads_what_is_written(tmp_path):
    write_all(tmp_path, [PLAN])
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not (tmp_path / INDEX_FILE).exists()


def test_every_tensor_is_aligned_to_its_dtype(tmp_path):
    write_all(tmp_path, [PLAN])
    for info in CheckpointReader(tmp_path).tensors.values():
        assert info.start % info.dtype.itemsize == 0, info


def test_several_shards_get_an_index(tmp_path):
    plans = split_plan(PLAN, max_bytes=40)
    assert len(plans) > 2 and [n for p in plans for n in p] == list(PLAN)
    write_all(tmp_path, plans)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    reader = CheckpointReader(tmp_path)
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.get(name), tensor)
        assert reader.info(name).file.name == index["weight_map"][name]
    assert reader.files[0].name == f"model-00001-of-{len(plans):05d}.safetensors"


def test_raw_copy(tmp_path):
    write_all(tmp_path, [PLAN])
    reader = CheckpointReader(tmp_path)
    shard = ShardWriter(tmp_path / "copy.safetensors", PLAN)
    for name in PLAN:
        shard.write_raw(name, reader.chunks(name))
    shard.close()
    assert (tmp_path / "copy.safetensors").read_bytes() == reader.files[0].read_bytes()


def test_the_plan_is_kept(tmp_path):
    shard = ShardWriter(tmp_path / "x.safetensors", {"a": (torch.float32, (2,))})
    for tensor in (torch.ones(3), torch.ones(2).half(), torch.ones(1, 2)):
        with pytest.raises(ValueError, match="planned"):
            ShardWriter(tmp_path / "y.safetensors", {"a": (torch.float32, (2,))}).write("a", tensor)
    for data in (b"\0" * 7, b"\0" * 9):
        with pytest.raises(ValueError, match="8 bytes"):
            ShardWriter(tmp_path / "y.safetensors", {"a": (torch.float32, (2,))}).write_raw(
                "a", [memoryview(data)]
            )
    with pytest.raises(ValueError, match="not in the plan"):
        shard.write("b", torch.ones(2))
    with pytest.raises(ValueError, match="not written"):
        shard.close()
    assert not (tmp_path / "x.safetensors").exists()
    shard.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="written before"):
        shard.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="two shards"):
        CheckpointWriter(tmp_path, [{"a": PLAN["odd"]}, {"a": PLAN["odd"]}])


def test_a_finished_shard_is_recognised_and_kept(tmp_path):
    plans = split_plan(PLAN, max_bytes=40)
    first = CheckpointWriter(tmp_path, plans)
    with first.shard(0) as shard:
        for name in plans[0]:
            shard.write(name, TENSORS[name])
    with pytest.raises(RuntimeError), first.shard(1):
        raise RuntimeError("killed here")
    second = CheckpointWriter(tmp_path, plans)
    assert [second.is_done(i) for i in range(len(plans))] == [True] + [False] * (len(plans) - 1)
    with pytest.raises(ValueError, match="was not written"):
        second.finish()
    for index, plan in enumerate(plans[1:], start=1):
        with second.shard(index) as shard:
            for name in plan:
                shard.write(name, TENSORS[name])
    second.finish()
    write_manifest(tmp_path)
    assert check_manifest(tmp_path)
    other = [{"other": PLAN["odd"]}, *plans[1:]]
    assert not CheckpointWriter(tmp_path, other).is_done(0)
    assert not list(tmp_path.glob("*.part"))


def test_hashes_find_a_flipped_bit(tmp_path):
    assert not check_manifest(tmp_path)
    write_all(tmp_path, [PLAN])
    assert check_manifest(tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    CheckpointReader(tmp_path)  # nothing else would notice
    with pytest.raises(CheckpointError, match="XXH3-128"):
        check_manifest(tmp_path)
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="bytes"):
        check_manifest(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        check_manifest(tmp_path)
    entry = {"size": 1, "sha256": "0" * 64}
    manifest = {"version": 2, "files": {"../x": entry}}
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not a file of this directory"):
        check_manifest(tmp_path)


def test_directory_appears_whole(tmp_path):
    target = tmp_path / "new" / "model"
    with AtomicDirectory(target) as partial:
        assert partial.parent == target.parent and partial.name.startswith(".model.partial-")
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "x"
    assert os.listdir(target.parent) == ["model"]


def test_an_error_leaves_nothing(tmp_path):
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), AtomicDirectory(tmp_path / "model") as partial:
            (partial / "file").write_text("x")
            raise error
        assert os.listdir(tmp_path) == []


def test_taken_targets_are_refused_before_anything_is_written(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("x")
    with pytest.raises(OutputError, match="is not empty"):
        AtomicDirectory(full)
    with pytest.raises(OutputError, match="is a file"):
        AtomicDirectory(full / "precious")
    assert os.listdir(tmp_path) == ["full"] and (full / "precious").read_text() == "x"


def test_a_name_that_is_too_long_is_refused(tmp_path):
    for length in (240, 300):
        with pytest.raises(OutputError, match=r"bytes too long: .* at most \d+ bytes"):
            AtomicDirectory(tmp_path / "x" / ("x" * length))
    with AtomicDirectory(tmp_path / ("x" * 230)):
        pass


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    # mounting something needs root
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(OutputError, match="mount point"):
        AtomicDirectory(tmp_path)


def test_a_target_filled_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(OutputError, match="is not empty"), AtomicDirectory(target) as partial:
        (partial / "file").write_text("ours")
        target.mkdir()
        (target / "file").write_text("theirs")
    assert (target / "file").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["model"]


def test_an_empty_target_and_a_link_to_one_are_used(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    with AtomicDirectory(tmp_path / "link") as partial:
        (partial / "file").write_text("x")
    assert (real / "file").read_text() == "x" and (tmp_path / "link").is_symlink()


def test_resume_keeps_what_was_written(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), AtomicDirectory(target, resume_tag="a1") as partial:
        (partial / "shard").write_text("x")
        raise RuntimeError
    again = AtomicDirectory(target, resume_tag="a1")
    assert again.partial.is_dir() and AtomicDirectory(target, "b2").unfinished() == [again.partial]
    with AtomicDirectory(target.with_name("other")):
        pass
    with again as partial:
        assert (partial / "shard").read_text() == "x"
        with pytest.raises(OutputError, match="another process"):
            AtomicDirectory(target, resume_tag="a1").__enter__()
    assert (target / "shard").read_text() == "x"


def test_umask_is_honoured(tmp_path):
    old = os.umask(0o027)
    try:
        with AtomicDirectory(tmp_path / "model") as partial:
            write_all(partial, [PLAN])
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o750
    for file in (tmp_path / "model").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o640, file


def write_slowly(kind, target, ready):
    with kind(target) as partial:
        (partial / "file").write_text("x")
        ready.set()
        time.sleep(60)


def test_scratch_of_a_killed_process_is_cleaned_up(tmp_path):
    target = tmp_path / "mo[d]el"  # no pattern
    context = multiprocessing.get_context("fork")  # spawning would import torch again
    ready = context.Event()
    process = context.Process(target=write_slowly, args=(ScratchDirectory, target, ready))
    process.start()
    assert ready.wait(30)
    with pytest.raises(RuntimeError), AtomicDirectory(target):
        # the other one is alive: left alone
        assert len(list(tmp_path.glob(".mo*.partial-*"))) == 3  # theirs, ours, and our lock
        process.kill()
        process.join()
        raise RuntimeError
    assert not target.exists() and len(list(tmp_path.glob(".mo*.partial-*"))) == 1
    with AtomicDirectory(target):
        assert not list(tmp_path.glob(".mo*.partial-scratch-*"))
    assert os.listdir(tmp_path) == ["mo[d]el"]


def test_scratch_directory_is_removed_and_left_alone_while_in_use(tmp_path):
    target = tmp_path / "model"
    with ScratchDirectory(target) as scratch:
        (scratch / "file").write_text("x")
        with AtomicDirectory(target) as partial:  # removes what killed processes left behind
            (partial / "copy").write_text((scratch / "file").read_text())
    assert os.listdir(tmp_path) == ["model"] and sorted(os.listdir(target)) == [
        "copy",
        MANIFEST_FILE,
    ]
    with pytest.raises(RuntimeError), ScratchDirectory(tmp_path / "other"):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["model"]
