"""A stand-in for the Hub that the real huggingface_hub client talks to, and models to push."""

import base64
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from support.models import llama
from support.random_adapter import random_adapter
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAQuantConfig, export_model, merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized

TOKEN = "hf_" + "s3cret" * 5
OWNER = "someone"


_REFUSED = {"unauthorized": 401, "forbidden": 403, "missing": 404}
_NOT_COMMITTED = {"conflict": 409, "changed": 412, "overloaded": 500}
_DROPPED = "dropped"


class Hub(ThreadingHTTPServer):
    """Repositories that were made, and the files that were committed to them."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.branches: dict[str, str] = {}  # of a repository; and the branch of the commit
        self.committed_to: str | None = None
        self.tokens: set[str | None] = set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _drop(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self):
        if _DROPPED in self.path:
            self._drop()
            return
        self._reply({"error": "not found"}, 404)

    do_HEAD = do_GET

    def do_PUT(self):
        data = self._body()
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        self._reply({})

    def do_POST(self):
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
        elif "/commit/" in self.path and _DROPPED in self.path:
            self._drop()
        elif "/commit/" in self.path and self.path.split("/")[4] in _NOT_COMMITTED:
            self._reply({"error": "no"}, _NOT_COMMITTED[self.path.split("/")[4]])
        elif "/commit/" in self.path:
            hub.committed_to = self.path.rpartition("/commit/")[2]
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._reply({"error": f"no {self.path}"}, 404)

    def _commit(self, lines):
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
def hub(monkeypatch):
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


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    """A quantized base; the 16-bit model that it names lies beside it."""
    root = tmp_path_factory.mktemp("hub")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    llama(vocab_size=32, num_hidden_layers=1, **sizes).save_pretrained(root / "tiny-base")
    (root / "tiny-base" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    quantization = QALoRAQuantConfig(bits=3, group_size=16, base={"name_or_path": "org/tiny-base"})
    AutoModelForCausalLM.from_pretrained(
        root / "tiny-base", quantization_config=quantization
    ).save_pretrained(root / "base")
    return root / "base"


@pytest.fixture
def merged_dir(base_dir, tmp_path):
    """The base with an adapter merged in."""
    base = open_quantized(base_dir)
    adapter = random_adapter(base, tmp_path / "adapter", rank=2, alpha=16)
    return merge_adapter(adapter, tmp_path / "merged", base_dir).out


@pytest.fixture
def exported_dir(merged_dir):
    """An export that needs no library to be written."""
    return export_model(merged_dir, merged_dir.parent / "export", "torchao").out
