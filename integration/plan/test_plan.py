"""`qalora plan` against the measured peak of real training runs on the CPU."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("measure.py")
SPEC = importlib.util.spec_from_file_location("measure", SCRIPT)
measure = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(measure)

LIMIT = 0.15


@pytest.mark.parametrize("name", ["llama/qalora", "gpt_neox/qalora/checkpointing"])
def test_prediction_is_near_the_peak(name: str) -> None:
    found = measure.run_case(name, "cpu")
    assert abs(found["error"]) < LIMIT, found


def test_recorded_predictions_are_near_the_peaks() -> None:
    recorded = json.loads(measure.RESULTS.read_text())
    assert set(recorded) == set(measure.cases())
    assert {n: row["error"] for n, row in recorded.items() if abs(row["error"]) >= LIMIT} == {}
