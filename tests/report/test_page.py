"""The page of a run: it needs no network, shows every chart, and escapes what comes from files."""

import json
import re
from html.parser import HTMLParser

import pytest

from qalora_plugin.report import charts
from qalora_plugin.report.page import as_html

EVIL = '<script>alert("1")</script>&'
FIGURES = {
    "history": [{"step": 1, "loss": "3.5"}, {"step": 2, "loss": 2.5, "eval_loss": 2.25}],
    "rows": [
        {"name": EVIL, "loss": 3.0, "size": 98_000_000, "bits_per_weight": 5.0},
        {"name": "merged, GGUF", "loss": None, "size": 98_000_000, "bits_per_weight": 5.0},
    ],
    "samples": [{"prompt": EVIL, "expected": "b", "before": "c", "after": "d", "llama_cpp": None}],
    "changes": {
        "offset_change": {f"model.layers.{n}.mlp.{EVIL}": n / 7 for n in range(3)} | {"head": 0.5}
    },
    "quantization_error": {"model.layers.0.mlp.up_proj": 0.01, EVIL: 0.02},
    "proof": {"merged": EVIL, "layers": 3, "logits": None},
    "files": {"qalora": 3_000_000, "gguf": 2_000_000},
    "commands": {"gguf": f"llama-cli -m {EVIL}"},
    "seconds": {"train": 12.5},
    "memory": {"peak of the process": 2_500_000_000},
    "recipe": {"base_model_name_or_path": EVIL},
    "versions": {"torch": "2.13.0"},
}
CHARTS = {"chart-chart-stages", "chart-chart-loss", "chart-chart-error", "chart-chart-size"}


class _Page(HTMLParser):
    """Tags, ids, texts, and attributes that a browser would follow."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.svgs, self.links, self.texts = [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        if tag == "svg":
            self.svgs.add(found.get("id"))
        self.links += [v for k, v in attrs if k in ("href", "src", "srcset", "action", "data")]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_stands_alone_and_shows_every_chart():
    pytest.importorskip("pygal", reason="charts need the extra report")
    text = as_html(FIGURES, "run")
    page = _Page(text)
    assert page.svgs == CHARTS
    assert page.links == ["data:,"]  # the icon: else a browser asks for one
    assert not re.search(r"https?://|@import|url\(|//[a-z]", text.replace(_XMLNS, ""))
    assert 'id="map-offset_change"' in text and text.count("<td style=") == 4
    assert len(text) < 2_000_000


_XMLNS = "http://www.w3.org/2000/svg"


def test_what_comes_from_files_is_escaped():
    page = _Page(as_html(FIGURES, EVIL))
    assert "script" not in page.tags
    assert sum(EVIL in text for text in page.texts) >= 8


def test_without_pygal_there_are_tables(monkeypatch):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    page = _Page(as_html(FIGURES, "run"))
    assert not page.svgs and page.tags.count("table") > 8
    assert any(".[report]" in text for text in page.texts)


def test_an_empty_run_has_no_empty_sections():
    page = _Page(as_html(json.loads("{}"), "run"))
    assert page.tags.count("section") == 1  # that nothing is proven


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_losses_that_are_no_numbers(loss):
    """An evaluation on rows without labels logs NaN; the page shows it, and draws the others."""
    history = [{"step": 1, "eval_loss": loss}, {"step": 2, "eval_loss": 2.5}]
    row = {"name": "base", "loss": loss, "size": 1, "bits_per_weight": 4.0}
    page = _Page(as_html({"history": history, "rows": [row]}, "run"))
    assert page.texts.count(str(loss)) == 2 and page.texts.count("2.5") >= 1
