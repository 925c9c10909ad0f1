"""`qalora plan` against the allocated peak of real training runs on the CPU."""

import importlib.util
import json
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("measure", Path(__file__).with_name("measure.py"))
measure = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(measure)

LIMIT = 0.03


@pytest.mark.parametrize("name", ["llama/qalora", "gpt_neox/qalora/checkpointing"])
def test_prediction_is_near_the_peak(name):
    found = measure.run_case(name, "cpu")
    assert abs(found["error"]) < LIMIT, found


def test_predictions_are_near_the_recorded_peaks():
    recorded = json.loads(measure.RESULTS.read_text())
    assert set(recorded) == set(measure.NAMES)
    for name, row in recorded.items():
        predicted = measure.predict(name, "cpu")
        assert abs(predicted / row["measured"] - 1) < LIMIT, (name, predicted, row)
