"""Pushing to a stand-in for the Hub: the real huggingface_hub client against a local server."""

import base64
import hashlib
import json
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qalora_plugin import QALoRAQuantConfig, export_model, merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.cli import main
from qalora_plugin.errors import OutputError
from qalora_plugin.files.hub import public_name
from qalora_plugin.hub.card import find_subject, make_card, subject_of
from qalora_plugin.hub.push import push, push_merged

TOKEN = "hf_" + "s3cret" * 5
OWNER = "someone"


_REFUSED = {"unauthorized": 401, "forbidden": 403, "missing": 404}


class Hub(ThreadingHTTPServer):
    """Repositories that were made, and the files that were committed to them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.branches: dict[str, str] = {}  # of a repository; and the branch of the commit
        self.committed_to: str | None = None
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _reply(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        self._reply({"error": "not found"}, 404)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        data = self._body()
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        self._reply({})

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        hub.tokens.add(self.headers.get("authorization"))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            if asked["name"] in _REFUSED:
                self._reply({"error": "you may not"}, _REFUSED[asked["name"]])
                return
            name = f"{asked.get('organization') or OWNER}/{asked['name']}"
            hub.repos[name] = asked["visibility"]
            self._reply({"url": f"{hub.url}/{name}"})
        elif self.path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            for file in files:
                file["uploadMode"] = "lfs" if file["path"].endswith("safetensors") else "regular"
                file["shouldIgnore"] = False
            self._reply({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}
            self._reply({"transfer": "basic", "objects": objects})
        elif "/branch/" in self.path:
            repo, _, branch = self.path.removeprefix("/api/models/").partition("/branch/")
            hub.branches[repo] = branch
            self._reply({})
        elif "/commit/" in self.path:
            hub.committed_to = self.path.rpartition("/commit/")[2]
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._reply({"error": f"no {self.path}"}, 404)

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        hub = self.server
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.objects[value["oid"]]
        repo, oid = self.path.removeprefix("/api/models/").partition("/commit/")[0], "0" * 40
        url = f"{hub.url}/{repo}/commit/{oid}"
        self._reply({"success": True, "commitOid": oid, "commitUrl": url})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(root / "tiny-base")
    (root / "tiny-base" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    quantization = QALoRAQuantConfig(bits=3, group_size=16, base={"name_or_path": "org/tiny-base"})
    AutoModelForCausalLM.from_pretrained(
        root / "tiny-base", quantization_config=quantization
    ).save_pretrained(root / "base")
    return root / "base"


@pytest.fixture
def merged_dir(base_dir: Path, tmp_path: Path) -> Path:
    tensors = {}
    for name, spec in open_quantized(base_dir).layers.items():
        key = f"base_model.model.{name}.qalora_"
        tensors[f"{key}A.weight"] = torch.full((2, spec.num_groups), 0.1)
        tensors[f"{key}B.weight"] = torch.full((spec.out_features, 2), 0.1)
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "QALORA", "r": 2, "lora_alpha": 16, "target_modules": "all-linear"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return merge_adapter(tmp_path / "adapter", tmp_path / "merged", base_dir).out


LOSSES = [{"loss": 2.5, "step": 10}, {"eval_loss": 1.25, "step": 10}, {"train_loss": 2.0}]


def test_push(
    hub: Hub,
    merged_dir: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    url = push_merged(merged_dir, "my-model", data="gsm8k", log_history=LOSSES)
    assert url == f"{hub.url}/{OWNER}/my-model"
    assert hub.repos == {f"{OWNER}/my-model": "private"}
    local = {path.name: path.read_bytes() for path in merged_dir.iterdir()}
    card = hub.files.pop("README.md").decode()
    assert hub.files == local and "README.md" not in local
    assert "Merging was exact" in card and "| training loss | 2.5000 (step 10) |" in card
    assert hub.committed_to == "main" and hub.branches == {}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    captured = capfd.readouterr()
    assert TOKEN not in captured.out + captured.err + caplog.text
    assert not any(TOKEN.encode() in content for content in hub.files.values())


def test_public_repository_of_an_organisation_and_a_card_that_is_there(
    hub: Hub, merged_dir: Path
) -> None:
    (merged_dir / "README.md").write_text("mine")
    push_merged(merged_dir, "org/my-model", private=False)
    assert hub.repos == {"org/my-model": "public"}
    assert hub.files["README.md"] == b"mine"


def test_card(hub: Hub, merged_dir: Path) -> None:
    subject = subject_of(open_quantized(merged_dir))
    card = make_card(subject, f"{OWNER}/my-model", "gsm8k", LOSSES)
    assert card.data.base_model == "org/tiny-base"
    assert "qalora" in card.data.tags and card.data.library_name == "transformers"
    assert "import qalora_plugin" in card.text
    assert "Needs the `qalora_plugin` package" in card.text
    for row in (
        "| base | [org/tiny-base](https://huggingface.co/org/tiny-base) |",
        "| bits | 3 |",
        "| group size | 16 |",
        "| adapted | zeros |",
        "| rank | 2 |",
        "| lora_alpha | 16 |",
        "| training data | gsm8k |",
        "| training loss | 2.5000 (step 10) |",
        "| evaluation loss | 1.2500 (step 10) |",
    ):
        assert row in card.text
    assert not re.search(r"[{}]", card.text)


def test_card_of_a_base_on_disk_has_its_licence_and_not_its_path(
    hub: Hub, merged_dir: Path, base_dir: Path
) -> None:
    checkpoint = open_quantized(merged_dir)
    directory = base_dir.parent / "tiny-base"
    checkpoint.config.base["name_or_path"] = str(directory)
    card = make_card(subject_of(checkpoint), "someone/my-model")
    assert card.data.license == "cc-by-4.0" and card.data.base_model is None
    assert "| base | tiny-base |" in card.text and str(directory) not in str(card)


def test_licence_of_a_base_without_a_card_is_that_of_its_config(
    hub: Hub, merged_dir: Path, tmp_path: Path
) -> None:
    checkpoint = open_quantized(merged_dir)
    (tmp_path / "base-2").mkdir()
    (tmp_path / "base-2" / "config.json").write_text('{"license": "mit"}')
    checkpoint.config.base["name_or_path"] = str(tmp_path / "base-2")
    card = make_card(subject_of(checkpoint), "someone/my-model")
    assert card.data.license == "mit"
    checkpoint.config.base["name_or_path"] = "unknown"
    (merged_dir / "LICENSE").write_text("...")
    card = make_card(subject_of(checkpoint), "someone/my-model")
    assert card.data.license == "other"


def test_refusals(
    hub: Hub, merged_dir: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match=r"is not a merged checkpoint\. Nothing was pushed"):
        push_merged(base_dir, "my-model")
    assert hub.repos == {}
    for name, status, advice in (
        ("unauthorized", 401, "hf auth login"),
        ("forbidden", 403, "write access"),
        ("missing", 404, "check the name"),
    ):
        with pytest.raises(OutputError, match=rf"{name}: .*HTTP {status}, .*{advice}") as caught:
            push_merged(merged_dir, name)
        assert f"qalora push {merged_dir} {name}" in str(caught.value)
        assert TOKEN not in str(caught.value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(OutputError, match=f"complete in {merged_dir}"):
        push_merged(merged_dir, "my-model")


@pytest.fixture
def exported_dir(merged_dir: Path) -> Path:
    """An export that needs no library to be written."""
    out = merged_dir.parent / "export"
    export_model(merged_dir, out, "torchao")
    return out


def test_command_pushes_an_export_to_a_branch(
    hub: Hub, exported_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"log_history": LOSSES}))
    command = ["push", str(exported_dir), "org/my-export", "--branch", "int3", "--no-private"]
    assert main([*command, "--trainer-state", str(state), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["format"], result["revision"], result["private"]) == ("torchao", "int3", False)
    assert result["url"] == f"{hub.url}/org/my-export"
    assert hub.repos == {"org/my-export": "public"}
    assert hub.branches == {"org/my-export": "int3"} and hub.committed_to == "int3"
    assert result["files"] == {name: len(content) for name, content in hub.files.items()}
    card = hub.files.pop("README.md").decode()
    assert hub.files == {path.name: path.read_bytes() for path in exported_dir.iterdir()}
    assert "Exact in fp32" in card and "pip install transformers torchao" in card
    assert "needs the `qalora_plugin`" not in card.lower()
    assert "| training loss | 2.5000 (step 10) |" in card and "| adapted | zeros |" in card
    assert "base_model: org/tiny-base" in card and "base_model_relation: quantized" in card


def test_dry_run_asks_nobody(
    hub: Hub, merged_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert main(["push", str(merged_dir), "my-model", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "my-model (private, branch main): would push" in out
    for path in merged_dir.iterdir():
        assert f"{path.stat().st_size:,}  {path.name}" in out
    assert "README.md" in out and "Merging was exact" in out
    assert hub.tokens == set() and not (merged_dir / "README.md").exists()


def test_what_is_no_model_of_ours_is_not_pushed(
    hub: Hub, base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = Path(__file__).parents[1] / "fixtures" / "gptq_4bit_g32_asym"
    (tmp_path / "empty").mkdir()
    for path in (base_dir.parent / "tiny-base", stock, tmp_path / "empty"):
        assert main(["push", str(path), "my-model"]) == 1
        assert "Nothing was pushed" in capsys.readouterr().err
    assert hub.tokens == set()


def test_a_base_and_its_exports_are_not_called_fine_tuned(base_dir: Path, tmp_path: Path) -> None:
    export_model(base_dir, tmp_path / "export", "torchao")
    for path in (base_dir, tmp_path / "export"):
        card = push(path, "someone/base", dry_run=True).card
        assert "quantized to INT3 (groups of 16), not fine-tuned." in card
        assert "QA-LoRA" not in card and "training data" not in card and "exact:" not in card
        with pytest.raises(OutputError, match="--data"):
            push(path, "someone/base", data="gsm8k", dry_run=True)


def test_several_merged_adapters_are_fine_tuning_too(merged_dir: Path) -> None:
    """What `merge_and_unload` of two adapters records."""
    checkpoint = open_quantized(merged_dir)
    adapters = [{"adapter": name, "adapt": "zeros", "r": 2} for name in "ab"]
    checkpoint.config.merged = {"adapter": "a, b", "adapters": adapters}
    card = make_card(subject_of(checkpoint), "someone/model", online=False)
    assert "fine-tuned with" in card.text and "fine-tuning is in the offsets." in card.text


def test_a_relative_path_is_no_repository(
    hub: Hub, merged_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`models/base` is one if such a directory is there, and then its last part is recorded."""
    assert public_name("models/base") == "models/base"
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("models/base") == "base" and public_name("") == ""
    assert public_name(".") == tmp_path.name
    checkpoint = open_quantized(merged_dir)
    checkpoint.config.base["name_or_path"] = "models/base"
    card = make_card(subject_of(checkpoint), "someone/my-model")
    assert card.data.base_model is None and "| base | base |" in card.text


def test_a_damaged_checkpoint_is_not_pushed(hub: Hub, merged_dir: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(merged_dir, tmp_path / "damaged")
    path = damaged / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    for dry_run in (True, False):
        with pytest.raises(OutputError, match=r"SHA-256 .*Nothing was pushed"):
            push(damaged, "my-model", dry_run=dry_run)
    assert hub.repos == {}


@pytest.mark.parametrize("name", ["bad//name", "a/b/c", "na me"])
def test_names_that_are_no_repository(name: str, merged_dir: Path) -> None:
    with pytest.raises(OutputError, match="expected NAME or ORG/NAME"):
        push(merged_dir, name, dry_run=True)


def test_trainer_state_has_to_be_one(
    merged_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["push", str(merged_dir), "my-model", "--dry-run", "--trainer-state"]
    for path in (merged_dir / "config.json", tmp_path / "none.json"):
        assert main([*command, str(path)]) == 1
        assert "takes the trainer_state.json" in capsys.readouterr().err


def test_card_of_an_inexact_export_says_what_it_costs(merged_dir: Path, exported_dir: Path) -> None:
    """As `qalora export --format gptq --requantize` leaves it."""
    loss = {"exact": 2.0, "requantized": 2.25, "divergence": 0.01, "tokens": 99, "text": "t"}
    path = exported_dir / "qalora_export.json"
    record = json.loads(path.read_text())
    record |= {"format": "gptq", "measured": loss, "exactness": "Quantized again, not exact: ..."}
    path.write_text(json.dumps(record))
    card = make_card(find_subject(exported_dir), "someone/model", online=False)
    assert "Quantized again, not exact" in card.text and "Merging was exact" not in card.text
    assert "| loss of the exact model | 2.0000 (nats a token, 99 held-out tokens) |" in card.text
    assert "| loss of this model | 2.2500 (" in card.text
    assert "| KL divergence from the exact model | 1.00e-02 (" in card.text


def test_result_of_a_push(hub: Hub, merged_dir: Path) -> None:
    result = push(merged_dir, "my-model")
    assert result.as_text().startswith(f"{hub.url}/{OWNER}/my-model: pushed ")
    assert result.card.encode() == hub.files["README.md"]
