"""The simulated heap against glibc's own, on the same sequences of allocations and frees."""

import json
import platform
import random
import statistics
import subprocess
import sys

import pytest

from qalora_plugin.plan.heap import Heap

KIB, MIB = 1 << 10, 1 << 20
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="compares with glibc's malloc")

# the process's own heap has holes that would take some of the blocks: they are filled first
REPLAY = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memalign.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.memalign.argtypes = [ctypes.c_size_t], [ctypes.c_size_t] * 2
libc.free.argtypes = [ctypes.c_void_p]
def read(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith(field)) * 1024
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
events = json.load(sys.stdin)
blocks = [None] * (1 + max(name for name, _, _ in events))
for size in [1 << power for power in range(16, 4, -1)]:
    end = libc.sbrk(0)
    while libc.sbrk(0) == end:
        ctypes.memset(libc.malloc(size - 8), 1, size - 8)
open("/proc/self/clear_refs", "w").write("5")
before = read("VmRSS")
for name, kind, size in events:
    if kind == "free":
        libc.free(blocks[name])
    else:
        blocks[name] = libc.malloc(size) if kind == "malloc" else libc.memalign(64, size)
        ctypes.memset(blocks[name], 1, size)
print(json.dumps([read("VmHWM") - before, read("VmRSS") - before]))
"""


def simulated(events):
    heap, blocks = Heap(), {}
    for name, kind, size in events:
        if kind == "free":
            heap.free(blocks.pop(name))
        else:
            blocks[name] = heap.malloc(size) if kind == "malloc" else heap.aligned(size)
    return heap.peak, heap.resident


def real(events):
    """Peak and last resident bytes of a fresh process, medians of three: the heap's first address
    is another each time, and once in a while glibc then gives less back."""
    command, given = [sys.executable, "-c", REPLAY], json.dumps(events)
    found = []
    for _ in range(3):
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return [statistics.median(values) for values in zip(*found, strict=True)]


def blocks(count, size, kind="aligned", first=0):
    return [(first + i, kind, size) for i in range(count)]


def frees(names):
    return [(name, "free", 0) for name in names]


def mapped_then_heap():
    # a freed map of 4 MiB raises the threshold: what follows is in the heap
    return [(0, "aligned", 4 * MIB), (0, "free", 0), *blocks(40, MIB, first=1)]


def pinned_top():
    # 40 MiB are free below a block in use: they are kept
    return [*mapped_then_heap(), (99, "aligned", 300 * KIB), *frees(range(1, 41))]


def trimmed_top():
    return [*mapped_then_heap(), *frees(range(1, 41))]


def holes_too_small():
    # small blocks sit in what the aligned ones gave back, so that no hole takes the same size again
    events = [(0, "aligned", 4 * MIB), (0, "free", 0)]
    for i in range(30):
        events += [(100 + i, "aligned", MIB), (200 + i, "malloc", 24), (300 + i, "malloc", 40)]
    return events + frees(range(100, 130)) + blocks(30, MIB, first=400)


def mapped():
    return [*blocks(3, 40 * MIB), *frees(range(3)), *blocks(2, 40 * MIB, first=10)]


def at_random():
    choose = random.Random(0)
    events, live = [(0, "aligned", 8 * MIB), (0, "free", 0)], []
    for name in range(1, 1500):
        if live and choose.random() < 0.48:
            events += frees([live.pop(choose.randrange(len(live)))])
        size = choose.choice([24, 40, 96, 180, 480, 5 * KIB, 300 * KIB, MIB, 2 * MIB, 5 * MIB])
        events.append((name, "malloc" if size < KIB else "aligned", size))
        live.append(name)
        if len(live) > 150:
            events += frees([live.pop(choose.randrange(len(live)))])
    return events


@GLIBC
@pytest.mark.parametrize(
    "sequence, tolerance",
    [
        (mapped_then_heap, 0.01),
        (pinned_top, 0.01),
        (trimmed_top, 0.01),
        (holes_too_small, 0.01),
        (mapped, 0.01),
        (at_random, 0.10),  # which hole a block takes depends on the heap's first address
    ],
)
def test_resident_bytes_are_those_of_glibc(sequence, tolerance):
    events = sequence()
    for ours, theirs in zip(simulated(events), real(events), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=1.5 * MIB)


def test_a_map_is_given_back_and_raises_the_threshold():
    heap = Heap()
    first = heap.malloc(4 * MIB)
    assert heap.resident >= 4 * MIB
    heap.free(first)
    assert heap.resident == 0
    pin = [heap.malloc(MIB), heap.malloc(5 * KIB)]
    heap.free(pin[0])
    assert MIB < heap.resident < MIB + 8 * KIB  # below a block in use
    heap.free(pin[1])
    assert heap.resident <= MIB + 8 * KIB  # at the top, but less than the trim threshold
    assert heap.peak >= 4 * MIB
