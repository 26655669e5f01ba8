"""An export is pushed to a Hub that stands on this machine; the token is said to nobody else."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mocov3_ds.encoders import hub
from mocov3_ds.evaluation import commands
from mocov3_ds.evaluation.flags import ExportOptions
from tests.evaluation.runs import make_run

TOKEN = "hf_secret_of_this_test"


class Hub(ThreadingHTTPServer):
    """As much of a Hub as an upload of small files asks for."""

    daemon_threads = True

    def __init__(self, repository: dict[str, Any] | None = None, refusal: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repository, self.refusal = repository, refusal
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.files: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if self.refusal:
            return self.refusal, {"error": f"not with {TOKEN}"}, {}
        if path.endswith("/api/repos/create"):
            self.repository = self.repository or {"siblings": []}
            return 200, {"url": f"{self.url}/someone/vit"}, {}
        if "/preupload/" in path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return 200, {"files": files}, {}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            oid = {"commitOid": "0" * 40, "commitUrl": f"{self.url}/someone/vit/commit/0"}
            return 200, {"success": True, "hookOutput": "", **oid}, {}
        if path.startswith("/api/validate-yaml"):
            return 200, {"errors": [], "warnings": []}, {}
        if self.repository is None:
            return 404, {"error": "none"}, {"X-Error-Code": "RepoNotFound"}
        return 200, {"id": "someone/vit", "sha": "0" * 40, **self.repository}, {}


class Handler(BaseHTTPRequestHandler):
    def respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub: Any = self.server
        hub.asked.append(f"{self.command} {self.path}")
        hub.tokens.add(self.headers.get("Authorization"))
        status, content, headers = hub.answer(self.command, self.path, body)
        text = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", f"{len(text)}")
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_HEAD = respond

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Hub(**options) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        yield server
        server.shutdown()


def test_an_export_is_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    with serve(monkeypatch) as server:
        commands.export_weights(ExportOptions(run=run, out=out, push="someone/vit", private=True))
    assert server.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert {*server.files} == {"README.md", "config.json", "model.safetensors", "timm.json"}
    assert server.tokens == {f"Bearer {TOKEN}"}
    said = capsys.readouterr()
    assert f"pushed to {server.url}/someone/vit" in said.out
    assert TOKEN not in said.out + said.err


def test_what_is_not_pushed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("vit", "a/b/c", "../a/b", "a/ b", ""):
        with pytest.raises(ValueError, match="is no USER/NAME"):
            hub.check_repository(name)
    theirs = {"siblings": [{"rfilename": "pytorch_model.bin"}], "tags": ["bert"]}
    with (
        serve(monkeypatch, repository=theirs) as server,
        pytest.raises(ValueError, match=r"holds a model that was not exported here \(pytorch_mod"),
    ):
        hub.check_repository("someone/vit")
    assert len(server.asked) == 1
    with serve(monkeypatch, repository={**theirs, "tags": [hub.TAG]}):
        hub.check_repository("someone/vit")
    with serve(monkeypatch, refusal=403) as server:
        with pytest.raises(ValueError, match="someone/vit cannot be pushed to http") as caught:
            hub.push_folder(tmp_path, "someone/vit")
        assert TOKEN not in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(ValueError, match=r"cannot be pushed to http://127\.0\.0\.1:9"):
        hub.check_repository("someone/vit")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="needs a token: set HF_TOKEN"):
        hub.check_repository("someone/vit")
