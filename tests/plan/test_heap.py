"""The simulated heap against glibc's own, on the same sequences of allocations and frees."""

import json
import platform
import random
import subprocess
import sys

import pytest

from qalora_plugin.plan.heap import Heap

KIB, MIB = 1 << 10, 1 << 20
LIBC = platform.libc_ver()
# posix_memalign looks for holes differently from 2.38 on
GLIBC = pytest.mark.skipif(
    LIBC not in [("glibc", f"2.{minor}") for minor in range(26, 38)],
    reason=f"compares with the malloc of glibc 2.26 to 2.37, not of {' '.join(LIBC)}",
)

# The process's own heap has holes and cached chunks that would take some of the blocks: they are
# used up first. Where the first chunk then starts, modulo the alignment, decides which ends of
# aligned blocks are given back and wait in the tcache, which is what keeps a freed top from being
# merged.
REPLAY = """
import ctypes, json, sys
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memalign.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.memalign.argtypes = [ctypes.c_size_t], [ctypes.c_size_t] * 2
libc.free.argtypes = [ctypes.c_void_p]
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
def read(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith(field)) * 1024
def use_up(cached):
    for size in [1 << power for power in range(16, 10, -1)]:
        end = libc.sbrk(0)
        while libc.sbrk(0) == end:
            ctypes.memset(libc.malloc(size - 8), 1, size - 8)
    for size in range(1040, 16, -16):
        for _ in range(cached):
            ctypes.memset(libc.malloc(size - 8), 1, size - 8)
events = json.load(sys.stdin)
blocks = [None] * (1 + max(name for name, _, _ in events))
use_up(cached=100)
open("/proc/self/clear_refs", "w").write("5")
before = read("VmRSS")
use_up(cached=8)  # what reading gave back
pad = (int(sys.argv[1]) - (libc.malloc(2048 - 8) - 16 + 2048)) % 64
if pad:
    libc.malloc(2048 + pad - 8)
for name, kind, size in events:
    if kind == "free":
        libc.free(blocks[name])
    else:
        blocks[name] = libc.malloc(size) if kind == "malloc" else libc.memalign(64, size)
        ctypes.memset(blocks[name], 1, size)
print(json.dumps([read("VmHWM") - before, read("VmRSS") - before]))
"""


def simulated(events, residue):
    """Peak and last resident bytes of a heap whose first chunk is at `residue` modulo 64."""
    heap, blocks = Heap(start=(residue or 64) - 8 + 64), {}
    before = heap.resident
    for name, kind, size in events:
        if kind == "free":
            heap.free(blocks.pop(name))
        else:
            blocks[name] = heap.malloc(size) if kind == "malloc" else heap.aligned(size)
    return heap.peak - before, heap.resident - before


def real(events, residue):
    """The same of a fresh process."""
    command = [sys.executable, "-c", REPLAY, str(residue)]
    done = subprocess.run(
        command, input=json.dumps(events), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


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
@pytest.mark.parametrize("residue", [0, 16, 32, 48])
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
def test_resident_bytes_are_those_of_glibc(sequence, tolerance, residue):
    events = sequence()
    found = zip(simulated(events, residue), real(events, residue), strict=True)
    for ours, theirs in found:
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
