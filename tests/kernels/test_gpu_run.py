"""What `gpu_run.py` reports of its measurements, and what `carry.py` takes along."""

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


def write(directory, stage, *rows):
    lines = [json.dumps(ORIGIN | row) + "\n" for row in rows]
    with (directory / f"stage{stage}.jsonl").open("a") as file:
        file.writelines(lines)


def verdict(directory, bound, where=""):
    import gpu_bounds

    found = [v for v in gpu_bounds.verdicts(directory) if bound in v.bound and where in v.where]
    assert len(found) == 1, found
    return found[0]


def test_a_decoder_layer_is_held_to_its_own_bound(tmp_path):
    for rows, ratio in ((4096, 1.12), (8192, 1.12)):
        base = {"operator": "decoder layer", "timing": "eager", "M": rows}
        write(
            tmp_path,
            2,
            base | {"variant": "qalora", "seconds_median": 1.0},
            base | {"ratio": "qalora / frozen", "ratio_median": ratio, **SPREAD},
            base | {"ratio": "qalora / lora", "ratio_median": 1 / 1.3, **SPREAD},
            {"operator": "decoder layer", "M": rows, "variant": "qlora_nf4", "not_run": "no such"},
        )
    assert verdict(tmp_path, "1.15 x the frozen", "eager M=4096").met is True
    assert verdict(tmp_path, "1.10 x the frozen", "eager M=8192").met is False
    assert verdict(tmp_path, "faster than lora (", "eager M=4096").met is True
    missing = verdict(tmp_path, "qlora_nf4", "eager M=4096")
    assert missing.met is None and "no such" in missing.note


def test_generation_is_held_to_the_bandwidth_and_to_fewer_bits(tmp_path):
    for bits, seconds, fraction in ((4, 2.0, 0.7), (2, 1.0, 0.8), (3, 2.5, 0.8)):
        base = {"operator": "linear", "timing": "graph", "K": 8192, "N": 8192, "M": 1}
        base |= {"bits": bits, "group_size": 32}
        measured = {"seconds_median": seconds, "copy_fraction": fraction}
        write(tmp_path, 2, base | {"variant": "qalora"} | measured)
        many = base | {"M": 2048, "ratio": "qalora / dense", "ratio_median": 1.2}
        write(tmp_path, 2, base | {"ratio": "qalora / dense", "ratio_median": 0.5, **SPREAD})
        write(tmp_path, 2, many | SPREAD)
    assert verdict(tmp_path, "copy bandwidth", "bits=4").met is False
    assert verdict(tmp_path, "copy bandwidth", "bits=2").met is True
    assert verdict(tmp_path, "faster than 4 bits", "bits=2").met is True
    assert verdict(tmp_path, "faster than 4 bits", "bits=3").met is False
    worst = verdict(tmp_path, "at any M", "bits=4")
    assert worst.met is False and "M=2048" in worst.where and worst.number == 1.2


def test_a_later_measurement_replaces_an_earlier_one_and_a_failure_does_not(tmp_path):
    training = {"operator": "SFT 1.1B"}
    pair = training | {"ratio": "qalora-4 / qlora", **SPREAD}
    write(
        tmp_path,
        3,
        training | {"variant": "qalora-4", "peak_bytes": 4},
        training | {"variant": "qlora", "peak_bytes": 5},
        training | {"variant": "qlora", "not_run": "out of memory, this time"},
        pair | {"ratio_median": 0.9},
        pair | {"ratio_median": 0.8},
    )
    assert verdict(tmp_path, "QLoRA's tokens").number == 0.8
    assert verdict(tmp_path, "peak memory").met is True


def test_failing_kernels_are_a_missed_bound(tmp_path):
    import gpu_bounds

    tests = {"operator": "kernel tests", "passed": 3, "failed": ["a::b"], "result": "3 passed"}
    write(tmp_path, 1, tests | {"exit_status": 1})
    write(tmp_path, 1, {"operator": "memcheck", "not_run": "not found"})
    assert verdict(tmp_path, "kernel tests pass").met is False
    assert verdict(tmp_path, "memory errors").met is None
    assert "0 bounds met, 1 missed, 1 absent" in gpu_bounds.summary(tmp_path)


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
