"""``ebft push`` against a stand-in of the hub on this machine, and ``ebft sample``."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from safetensors.torch import load_file, save_file

from ebft import EBFTConfig, run_ebft
from ebft.cli.app import main

TOKEN = "hf_verysecret"


class Hub(BaseHTTPRequestHandler):
    """Takes what ``HfApi.create_repo`` and ``upload_folder`` send."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        said, (_, path) = self.server.said, ("", self.path.split("?")[0])
        said.append((path, self.headers["Authorization"], body))
        if self.server.refuses:
            return self.answer({"error": f"no, {TOKEN} may not"}, 403)
        if path == "/api/repos/create":
            return self.answer({"url": f"{self.server.address}/user/repo"})
        if path.endswith("/preupload/main"):
            files = [{**file, "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.answer({"files": [{**file, "shouldIgnore": False} for file in files]})
        return self.answer({"commitOid": "0" * 40, "commitUrl": f"{self.server.address}/user/repo/commit/0"})

    def do_GET(self):
        self.server.said.append((self.path, self.headers["Authorization"], b""))
        self.answer({"siblings": [], "sha": "0" * 40, "id": "user/repo"})

    def answer(self, content, status=200):
        sent = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, which huggingface_hub talks to in this test."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.said, server.refuses = [], False
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()


@pytest.fixture
def finished(short_run, silent):
    """The folder of a run without recovery."""
    return run_ebft(config=EBFTConfig.of(**short_run(recover="none", prune="magnitude")), reporter=silent).output


def uploaded(hub):
    """Name -> content, of what was committed."""
    (commit,) = [body for path, _, body in hub.said if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    return {of["value"]["path"]: base64.b64decode(of["value"]["content"]) for of in lines if of["key"] == "file"}


def test_what_the_run_made_is_uploaded_and_nothing_else(hub, finished, capfd):
    (finished / "thesis.tex").write_text("mine")
    assert main(["push", str(finished), "user/repo", "--private"]) == 0
    said = capfd.readouterr()
    made = json.loads((finished / "ebft_summary.json").read_text())
    files = uploaded(hub)
    assert files.keys() == set(made["files"])
    assert files["masks.safetensors"] == (finished / "masks.safetensors").read_bytes()
    for name in ("ebft_summary.json", "README.md", "report.html"):
        assert str(finished.parent).encode() not in files[name], name
    assert json.loads(files["ebft_summary.json"])["sparsity"] == made["sparsity"]
    asked = json.loads(hub.said[0][2])
    assert asked.get("visibility", "private" if asked.get("private") else "public") == "private"  # by the library's age
    assert {authorisation for _, authorisation, _ in hub.said} == {f"Bearer {TOKEN}"}
    assert TOKEN not in said.out + said.err
    assert said.out.strip().endswith("/user/repo")


def test_a_folder_with_a_fault_is_not_uploaded(hub, finished, capsys):
    weights = load_file(finished / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].fill_(1.0)
    save_file(weights, finished / "model.safetensors", metadata={"format": "pt"})
    assert main(["push", str(finished), "user/repo"]) == 1
    assert re.search(r"fault: .*up_proj.*\n.*1 faults; nothing was uploaded", capsys.readouterr().out)
    assert hub.said == []


def test_what_the_hub_refuses_is_said_without_the_token(hub, finished, capsys, monkeypatch):
    hub.refuses = True
    assert main(["push", str(finished), "user/repo"]) == 2
    said = capsys.readouterr().err
    assert f"ebft: {finished} cannot be pushed to user/repo: " in said
    assert TOKEN not in said
    assert main(["push", str(finished), "user"]) == 2
    assert "'user' can be no repository; expected USER/NAME" in capsys.readouterr().err
    monkeypatch.setattr("ebft.output.push.get_token", lambda: None)
    assert main(["push", str(finished), "user/repo"]) == 2
    assert "nobody is logged in to the hub: run hf auth login" in capsys.readouterr().err


def test_samples_side_by_side(tiny, capsys):
    model = str(tiny / "model")
    assert main(["sample", model, "One [b]", "Two", "--against", model, "--tokens", "5", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "“One [b]”" in said
    assert "“Two”" in said
    assert main(["sample", model, "--tokens", "0"]) == 2
    assert main(["sample", "/nowhere/at/all"]) == 2
    assert "no such folder" in capsys.readouterr().err
