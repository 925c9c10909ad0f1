"""The README's tables hold what the data files say."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "integration" / "peers" / "quantizer_table.py"


@pytest.fixture(scope="module")
def quantizer_table():
    spec = importlib.util.spec_from_file_location("quantizer_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(draw: int, loss: float) -> dict:
    return {
        "engine": "qalora",
        "version": "1",
        "text": "sources",
        "bits": 3,
        "desc_act": True,
        "draw": draw,
        "heldout_loss": loss,
        "heldout_kl": 0.5,
    }


def test_a_line_is_the_mean_and_spread_of_its_draws(quantizer_table):
    lines = quantizer_table.table([row(0, 1.0), row(1, 3.0)]).splitlines()
    assert lines[2:] == ["| sources | 3 | yes | qalora 1 | 2.0000 ± 1.4142 | 0.5000 ± 0.0000 | 2 |"]


def test_the_quantizer_tables_are_those_of_their_rows(quantizer_table):
    for document, rows in quantizer_table.TABLES.items():
        text = document.read_text()
        assert quantizer_table.fill(text, json.loads(rows.read_text())) == text, (
            f"{document}: the quantizer table is out of date: run "
            "integration/peers/quantizer_table.py"
        )
