"""Hashes of files: read once, in whatever order they are written."""

import hashlib
import os

import pytest
import xxhash

from qalora_plugin.files import digests
from qalora_plugin.files.digests import SHA256, WrittenHash, file_digest


@pytest.fixture
def path(tmp_path):
    """A file of a few bytes."""
    found = tmp_path / "model.safetensors"
    found.write_bytes(b"some weights")
    return found


def flip(path):
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 2]) + data[1:])


def test_both_hashes_of_a_file_are_known_apart(path):
    data = path.read_bytes()
    assert file_digest(path) == xxhash.xxh3_128(data).hexdigest()
    assert file_digest(path, SHA256) == hashlib.sha256(data).hexdigest()


def test_each_file_is_read_once_as_long_as_it_does_not_change(path, monkeypatch):
    old = path.stat().st_mtime_ns - 10**9
    os.utime(path, ns=(old, old))
    first = file_digest(path)
    monkeypatch.setattr(digests, "open_regular", lambda *_: pytest.fail("read again"))
    assert file_digest(path) == first
    monkeypatch.undo()
    flip(path)
    assert file_digest(path) != first


def test_a_file_that_was_just_written_is_read_again(path):
    stamp = path.stat().st_mtime_ns
    flip(path)
    before = file_digest(path)
    flip(path)
    os.utime(path, ns=(stamp, path.stat().st_mtime_ns))
    assert file_digest(path) != before


def test_a_file_is_hashed_while_it_is_written_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_PIECE", 1000)
    path, data = tmp_path / "model.safetensors", os.urandom(16000)
    with path.open("w+b", buffering=0) as file:
        written = WrittenHash(file)
        for start in (4000, 0, 12000, 2000, 2000 + 4000, 8000, 10000, 14000):
            os.pwrite(file.fileno(), data[start : start + 2000], start)
            written.wrote(start, start + 2000)
        written.finish(path)
    monkeypatch.setattr(digests, "open_regular", lambda *_: pytest.fail("read again"))
    assert file_digest(path) == xxhash.xxh3_128(data).hexdigest()


def test_a_file_with_a_gap_is_read_whole(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("w+b", buffering=0) as file:
        written = WrittenHash(file)
        os.pwrite(file.fileno(), b"end", 5)
        written.wrote(5, 8)
        written.finish(path)
    assert file_digest(path) == xxhash.xxh3_128(bytes(5) + b"end").hexdigest()
