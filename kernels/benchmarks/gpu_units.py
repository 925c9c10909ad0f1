"""The pieces that `gpu_run.py` runs: each a command of its own, small enough to repeat."""

from __future__ import annotations

from dataclasses import dataclass

SHAPES_7B = "4096x4096,4096x11008,11008x4096"  # K x N
SHAPES_70B = "8192x8192,8192x28672"
GENERATION = f"{SHAPES_7B},{SHAPES_70B}"
MANY_ROWS = "32,64,128,256,512,1024,2048,4096,8192,16384"
PEERS = "tinygemm,bitsandbytes_nf4"  # gemlite tunes for long at first use: units of its own


@dataclass(frozen=True)
class Unit:
    """One command.

    Args:
        name: unique.
        stage: 1 to 3; its rows go to stage<N>.jsonl.
        command: script of this folder, and its arguments; --device and --output are added.
        limit: seconds after which it is stopped.
        together: units of the same word that follow each other run at the same time.
    """

    name: str
    stage: int
    command: tuple[str, ...]
    limit: int
    together: str = ""


def unit(name: str, stage: int, command: str, limit: int, together: str = "") -> Unit:
    return Unit(name, stage, tuple(command.split()), limit, together)


def for_gpu() -> list[Unit]:
    """Everything, the most wanted first within a stage."""
    units = [
        unit("machine", 1, "checks.py machine", 60),
        unit("kernel tests", 1, "checks.py tests", 480),
        unit("memcheck", 1, "checks.py sanitizer", 300),
        unit("GPU tests", 1, "checks.py gpu-tests", 300),
    ]
    for bits in (4, 2, 3, 8):
        command = f"tune.py --shapes 4096x4096 --bits {bits} --compile-only"
        units.append(unit(f"compile {bits} bits", 2, command, 300, "compile"))
    units.append(unit("tune 4 bits", 2, f"tune.py --shapes {GENERATION} --bits 4", 180))
    for rows in (4096, 8192, 2048, 16384):
        units.append(unit(f"decoder layer {rows}", 2, f"decoder.py --rows {rows}", 240))
    for shapes in (SHAPES_7B, SHAPES_70B):
        command = f"linear.py --shapes {shapes} --bits 4 --rows 1,2,4,8,16 --peers {PEERS}"
        units.append(unit(f"generation 4 bits {shapes}", 2, command, 180))
    many = f"linear.py --shapes {GENERATION} --bits 4 --rows {MANY_ROWS} --rounds 9"
    units.append(unit("many rows 4 bits", 2, many, 240))
    units.append(unit("tune 2, 3, 8 bits", 2, f"tune.py --shapes {GENERATION} --bits 2,3,8", 400))
    for bits in (2, 3, 8):
        command = f"linear.py --shapes {GENERATION} --bits {bits} --rows 1,2,4,8,16"
        units.append(unit(f"generation {bits} bits", 2, command, 180))
    for k_n in ("4096x4096", "4096x11008", "8192x28672"):
        command = f"linear.py --shapes {k_n} --bits 4 --rows 1,16 --peers gemlite"
        units.append(unit(f"gemlite 4 bits {k_n}", 2, command, 300))
    many = f"linear.py --shapes {SHAPES_7B} --bits 2,3,8 --rows {MANY_ROWS} --rounds 7"
    units.append(unit("many rows 2, 3, 8 bits", 2, many, 300))
    units.append(unit("operators", 2, "bench.py --quick --only operators", 200))
    for peers in ("lora,qlora", "qalora-3,qalora-2"):
        command = f"sft.py --variants qalora-4,{peers}"
        units.append(unit(f"SFTTrainer {peers}", 3, command, 400))
    return units


def for_rehearsal() -> list[Unit]:
    """Every script and every kind of unit on tiny shapes."""
    layer = "decoder.py --rows 32 --sequence 16 --hidden 64 --intermediate 96 --heads 4 --rank 4"
    model = "--model tiny --batch 2 --sequence 32 --steps 2 --rounds 2 --rank 4"
    tiny = "--shapes 64x96 --rounds 2 --rotation 1"
    return [
        unit("machine", 1, "checks.py machine", 60),
        unit("kernel tests", 1, "checks.py tests", 120),
        unit("memcheck", 1, "checks.py sanitizer", 120),
        unit("compile 4 bits", 2, "tune.py --shapes 64x96 --bits 4 --compile-only", 60, "compile"),
        unit("compile 2 bits", 2, "tune.py --shapes 64x96 --bits 2 --compile-only", 60, "compile"),
        unit("tune", 2, "tune.py --shapes 64x96 --bits 4", 60),
        unit("decoder layer 32", 2, f"{layer} --rounds 2", 120),
        unit(
            "generation", 2, f"linear.py {tiny} --bits 4,2 --rows 1,16 --peers {PEERS},gemlite", 120
        ),
        unit("SFTTrainer", 3, f"sft.py {model} --variants qalora-4,lora", 120),
    ]
