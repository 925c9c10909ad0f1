"""The study's plan and tables, and that README and docs hold what its data files say."""

import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[2] / "recipes" / "study"


@pytest.fixture
def report(monkeypatch):
    """Import recipes/study/report.py with its neighbours on the path, as when it runs."""
    monkeypatch.syspath_prepend(str(STUDY))
    for path in STUDY.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    import report

    return report


def _row(lr, seed, loss, bits=4):
    row = {"method": "both", "bits": bits, "lr": lr, "seed": seed}
    return row | {"validation_loss": loss, "test_loss": loss + 1, "parameters": 1000}


def test_rates_are_swept_at_4_bits_until_the_best_lies_inside(report):
    plan = report.plan
    first = [("both", 4, rate, 0) for rate in plan.FIRST_RATES]
    assert plan.missing([], "both", 4) == plan.missing([], "both", 3) == first
    rows = [_row(0.003, 0, 3.0), _row(0.01, 0, 2.0), _row(0.03, 0, 1.0)]
    assert plan.missing(rows, "both", 4) == [("both", 4, 0.1, 0)]
    rows.append(_row(0.1, 0, 1.5))
    assert plan.missing(rows, "both", 4) == [("both", 4, 0.03, seed) for seed in (1, 2)]
    assert plan.missing(rows, "both", 3) == [("both", 3, 0.03, seed) for seed in (0, 1, 2)]
    rows += [_row(0.03, 1, 1.2), _row(0.03, 2, 0.8)]
    assert plan.missing(rows, "both", 4) == []
    assert len(plan.final_rows(rows, "both", 4)) == 3


def test_a_sweep_ends_at_the_last_rate(report):
    plan = report.plan
    rows = [_row(rate, 0, -rate) for rate in plan.RATES]
    assert plan.missing(rows, "both", 4) == [("both", 4, plan.RATES[-1], seed) for seed in (1, 2)]


def test_comparison_gives_mean_spread_and_rate(report):
    rows = [_row(0.03, seed, loss) for seed, loss in enumerate((1.0, 1.1, 1.2))]
    rows += [_row(0.1, 0, 1.9), _row(0.03, 0, 1.3, bits=3)]
    lines = report.comparison(rows).splitlines()
    columns = ["", "trained parameters", "learning rate", *(f"{b} bits" for b in (16, 4, 3, 2))]
    assert lines[0] == f"| {' | '.join(columns)} |"
    assert lines[-1] == "| `both` | 1,000 | 0.03 |  | 2.100 ± 0.100 | 2.300 |  |"


def test_step_costs_take_the_newest_run_of_each_mode(report):
    def step(run, variant, seconds):
        sizes = {"peak_bytes": 300 << 20, "saved_bytes": 20 << 20}
        row = {"operator": report.STEP, "run": run, "variant": variant}
        return row | {"seconds_median": seconds} | sizes

    rows = [
        step("1", "qalora_both", 9.0),
        step("1", "lora", 1.0),
        step("2", "qalora_both", 0.3),
        step("2", "lora", 7.0) | {"operator": "linear"},
        step("2", "lora", 0.2),
    ]
    assert report.step_costs(rows).splitlines()[2:] == ["| `both` | 300 | 1.50 | 300 |  | 20 |"]
    rows[2]["allocated_peak_bytes"] = 200 << 20
    assert report.step_costs(rows).splitlines()[2:] == ["| `both` | 300 | 1.50 | 300 | 200 | 20 |"]
    assert "bench.py" in report.step_costs([])


def _draw(draw, loss, engine="qalora", kl=0.5):
    setting = {"engine": engine, "version": "1", "text": "sources", "bits": 3, "desc_act": True}
    return setting | {"draw": draw, "heldout_loss": loss, "heldout_kl": kl}


def test_a_quantizer_has_mean_and_spread_of_its_draws(report):
    lines = report.quantizer_table.table([_draw(0, 1.0), _draw(1, 3.0)]).splitlines()
    assert lines[2:] == ["| sources | 3 | yes | qalora 1 | 2.0000 ± 1.4142 | 0.5000 ± 0.0000 | 2 |"]


def test_quantizers_are_summed_up_by_the_range_of_their_settings(report):
    rows = [_draw(0, 1.0), _draw(0, 1.5, "gptqmodel", 1.0)]
    rows += [row | {"bits": 2} for row in (_draw(0, 2.25), _draw(0, 2.0, "gptqmodel", 0.625))]
    text = " ".join(report.quantizer_table.summary(rows).split())
    assert "0.50 to 0.80 times the KL divergence" in text
    assert "in all 2 settings" in text
    assert "lower in 1 of them, by up to 0.500 nats, and higher by at most 0.2500" in text


def test_the_documents_hold_what_the_data_says(report):
    tables = report.tables()
    assert len(tables) == 5
    for document, parts in tables.items():
        assert report.filled(document, parts) == (report.ROOT / document).read_text(), (
            f"{document} is out of date: run python recipes/study/report.py"
        )


def test_a_script_goes_on_where_it_was_stopped(report, tmp_path, capsys):
    session = report.compare_modes.session
    parser = session.options("A script.", tmp_path / "results" / "rows.jsonl")

    def next_run(rows):
        row = {"run": len(rows)}
        return (lambda bases: [row | {"folder": bases.is_dir()}]) if len(rows) < 3 else None

    assert session.work(parser.parse_args(["--seconds", "-1"]), next_run) == 3
    assert "start this command again" in capsys.readouterr().out
    assert session.work(parser.parse_args([]), next_run) == 0
    assert session.work(parser.parse_args(["--seconds", "-1"]), next_run) == 0
    rows = report.read_rows(tmp_path / "results" / "rows.jsonl")
    assert rows == [{"run": number, "folder": True} for number in range(3)]
