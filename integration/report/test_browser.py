"""The report in a real browser, headless Chromium, as wide as a phone and as a desktop."""

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

from qalora_plugin.report.page import as_html

pytest.importorskip("pygal", reason="charts need the extra report")
LAYERS = [f"model.layers.{n}.mlp.up_proj" for n in range(30)]
FIGURES = {
    "history": [{"step": n, "loss": 3 - n / 9, "eval_loss": 3 - n / 12} for n in range(1, 9)],
    "rows": [
        {"name": name, "loss": loss, "size": 98_362_432, "bits_per_weight": 5.0}
        for name, loss in (("GGUF base", 3.4), ("GGUF + adapter", 2.2), ("merged", 2.2))
    ],
    "samples": [{"prompt": "def f(x):\n    return " + "x + " * 60 + "x", "after": "Return x."}],
    "changes": {"offset_change": {name: n / 30 for n, name in enumerate(LAYERS)}},
    "quantization_error": {name: 0.01 + n / 1000 for n, name in enumerate(LAYERS)},
    "files": {"qalora": 190_000_000, "gguf": 98_362_432},
    "commands": {"gguf": "llama-cli -m " + "/a/long/path" * 12},
    "recipe": {"base_model_name_or_path": "/a/long/path" * 12},
}
PROBE = """<iframe width="{width}" height="900" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>onload = () => {{
  const frame = document.querySelector("iframe").contentWindow;
  const root = frame.document.documentElement;
  const asked = frame.performance.getEntriesByType("resource").map(entry => entry.name);
  const charts = [...root.querySelectorAll("svg")].map(s => s.getBoundingClientRect().height);
  document.getElementById("found").textContent =
    JSON.stringify({{width: root.scrollWidth, client: root.clientWidth, charts, asked}});
}}</script>"""


@pytest.fixture(scope="module")
def browser():
    """The path of Chromium; QALORA_BROWSER names another one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("QALORA_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on the PATH, and QALORA_BROWSER names none")
    return path


def look(browser, page, width, folder):
    """Return what the page measures in a frame of that width, and what Chromium says about it."""
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(width=width, page=escape(page, quote=True)))
    quiet = ("--disable-background-networking", "--disable-component-update", "--no-first-run")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *quiet]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr"]
    command += ["--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1]
    return json.loads(unescape(found)), done.stderr


@pytest.mark.parametrize("width", [390, 1280])
def test_no_error_no_request_every_chart(width, browser, tmp_path):
    found, said = look(browser, as_html(FIGURES, "run"), width, tmp_path)
    assert len(found["charts"]) == 4 and min(found["charts"]) > 100
    assert found["width"] <= found["client"] <= width  # nothing sticks out
    assert "CONSOLE" not in said and found["asked"] == []


def test_errors_and_requests_would_be_seen(browser, tmp_path):
    address = "http://127.0.0.1:9/picture.png"
    page = f'<img src="{address}"><script>console.error("seen")</script>'
    found, said = look(browser, page, 390, tmp_path)
    assert "CONSOLE" in said and found["asked"] == [address]
