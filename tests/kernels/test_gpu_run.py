"""What `gpu_run.py` makes of its measurements, and what `carry.py` takes along."""

import json
import zipfile
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"
ORIGIN = {"run": "now", "device": "a GPU", "torch": "2.11.0", "commit": "abc"}
SPREAD = {"ratio_q1": 0.9, "ratio_q3": 1.2}


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def judged(rows, text, **row):
    """The verdict (met, number, note) of the one bound with this text and these values."""
    import gpu_units

    bounds = [b for u in gpu_units.units() for b in u.bounds if text in b.text]
    (bound,) = (b for b in bounds if row.items() <= b.row.items())
    return bound.judge(rows)


def test_all_units_fit_into_fifteen_minutes_with_the_machine_s_start():
    import gpu_units

    assert sum(unit.limit for unit in gpu_units.units()) <= 14 * 60


def test_memcheck_selects_tests_that_exist():
    import gpu_units

    from . import conftest, test_operators

    names = [name for name in vars(test_operators) if name.startswith("test_")]
    known = " ".join(["triton", *names, *map(conftest.case_id, conftest.CASES)])
    for rehearse in (False, True):
        (unit,) = (unit for unit in gpu_units.units(rehearse) if unit.name == "memcheck")
        words = unit.command.partition(" -k ")[2].strip("'").split(" and ")
        assert words[0] and all(word in known for word in words), words


def test_a_decoder_layer_is_held_to_its_own_bound():
    rows = []
    for m in (4096, 8192):
        base = {"timing": "eager", "M": m, "ratio_median": 1.12, **SPREAD}
        rows += [
            base | {"operator": "linears of the layer", "ratio": "qalora / frozen"},
            base | {"operator": "decoder layer", "ratio": "qalora / lora", "ratio_median": 0.77},
            {"operator": "decoder layer", "M": m, "variant": "qlora_nf4", "not_run": "no such"},
        ]
    assert judged(rows, "bare bf16", timing="eager", M=4096)[:2] == (True, 1.12)
    assert judged(rows, "bare bf16", timing="eager", M=8192)[:2] == (False, 1.12)
    assert judged(rows, "as LoRA", timing="eager", M=4096)[0] is True
    assert judged(rows, "as QLoRA", timing="eager", M=4096) == (None, None, "no such")
    assert judged(rows, "as LoRA", timing="graph", M=4096) == (None, None, "not measured")


def test_one_row_is_held_to_the_bandwidth_and_to_fewer_bits():
    base = {"operator": "linear", "timing": "graph", "K": 8192, "N": 28672, "M": 1}
    rows = [
        base | {"bits": bits, "variant": "qalora", "seconds_median": seconds, "copy_fraction": part}
        for bits, seconds, part in ((4, 2.0, 0.7), (2, 1.0, 0.8), (3, 2.5, 0.8))
    ]
    assert judged(rows, "copy bandwidth", K=8192)[:2] == (False, 0.7)
    assert judged(rows, "faster than 4 bits", K=8192, bits=2)[:2] == (True, 0.5)
    assert judged(rows, "faster than 4 bits", K=8192, bits=3)[:2] == (False, 1.25)
    assert judged(rows, "faster than 4 bits", K=4096, bits=3)[0] is None
    many = base | {"K": 4096, "N": 11008, "M": 2048, "bits": 4, "ratio": "qalora / dense"}
    rows.append(many | {"ratio_median": 1.2, **SPREAD})
    assert judged(rows, "dense bf16", M=2048)[:2] == (False, 1.2)


def test_a_later_measurement_replaces_an_earlier_one_and_a_failure_does_not():
    training = {"operator": "SFT 1.1B"}
    pair = training | {"ratio": "qalora / qlora_nf4", **SPREAD}
    rows = [
        training | {"variant": "qalora", "peak_bytes": 4, "peak_over_plan": 1.2},
        training | {"variant": "qlora_nf4", "peak_bytes": 5},
        training | {"variant": "qlora_nf4", "not_run": "out of memory, this time"},
        pair | {"ratio_median": 0.9},
        pair | {"ratio_median": 0.8},
    ]
    assert judged(rows, "QLoRA's tokens")[:2] == (True, 0.8)
    assert judged(rows, "less peak memory")[:2] == (True, 0.8)
    assert judged(rows, "qalora plan")[:2] == (False, 1.2)


def test_failing_kernels_are_a_missed_bound_of_the_summary(tmp_path):
    import gpu_units

    ended = {"unit": "kernel tests", "exit_status": 1, "result": "1 failed, 3 passed"}
    (tmp_path / "units.jsonl").write_text(json.dumps(ended) + "\n")
    measured = ORIGIN | {"operator": "dequantize", "copy_fraction": 0.9}
    (tmp_path / "stage4.jsonl").write_text(json.dumps(measured) + "\n")
    text = gpu_units.summary(tmp_path)
    assert text.startswith("bounds: 1 met, 1 missed, ")
    (line,) = (line for line in text.splitlines() if "kernel tests" in line)
    assert line.startswith("MISSED") and "1 failed, 3 passed" in line
    assert "device a GPU, torch 2.11.0, commit abc" in text


def test_bitsandbytes_is_carried_for_one_cuda_version(tmp_path):
    import carry

    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    libraries = [f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cpu", "cuda130", "rocm72")]
    record = "bitsandbytes-1.dist-info/RECORD"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in libraries:
            archive.writestr(name, "x")
        archive.writestr(record, "".join(f"{name},sha256=0,1\n" for name in libraries))
    carry.keep_cuda(wheel, "130")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.namelist() == [*libraries[:2], record]
        assert archive.read(record).decode().count("\n") == 2
    with pytest.raises(SystemExit, match="no libbitsandbytes_cuda999"):
        carry.keep_cuda(wheel, "999")
