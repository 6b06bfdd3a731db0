"""The real huggingface_hub against a small hub on the loopback interface: list, download, verify, cache."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

pytest.importorskip("huggingface_hub")
COMMIT = "1" * 40
HEADER = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
FILES = {
    "config.json": b"{}",
    "qwen.tiktoken": b"IQ== 0\n",
    "model.safetensors": len(HEADER).to_bytes(8, "little") + HEADER + bytes(8),
    "modeling_qwen.py": b"raise SystemExit",
    "README.md": b"#",
}


class Hub(BaseHTTPRequestHandler):
    """The few routes that huggingface_hub asks for; weights are LFS files, the rest plain ones."""

    files: dict[str, bytes]
    corrupt = False
    asked: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.asked.append(path)
        if "/resolve/" in path:
            data = self.files.get(path.split("/resolve/")[1].split("/", 1)[1])
            if data is None:
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            tag = hashlib.sha256(data).hexdigest()
            served = data[:-1] + b"\xff" if self.corrupt and path.endswith(".safetensors") else data
            return self.reply(200, served, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
        siblings = [
            {"rfilename": n, "size": len(d), "path": n, "type": "file", "oid": "0", "blobId": "0"}
            | ({"lfs": {"sha256": hashlib.sha256(d).hexdigest(), "size": len(d), "pointerSize": 1,
                        "oid": hashlib.sha256(d).hexdigest()}} if n.endswith(".safetensors") else {})
            for n, d in self.files.items()
        ]  # fmt: skip
        info = {"id": "Qwen/Qwen-7B", "_id": "0", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        self.reply(200, json.dumps(siblings if "/tree/" in path else info).encode(), {"X-Repo-Commit": COMMIT})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[tuple[type[Hub], str]]:
    handler = type("H", (Hub,), {"files": FILES, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def resolve_there(endpoint: str, tmp_path: Path, hub: str) -> subprocess.CompletedProcess[str]:
    """resolve() in a process of its own: huggingface_hub reads its environment when imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "QWEN_RT"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "QWEN_RT_CACHE": str(tmp_path / "own")}
    env |= {"HF_HUB_DISABLE_XET": "1", "MODELSCOPE_CACHE": str(tmp_path / "ms"), "no_proxy": "*"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    code = f"from qwen_rt.hub import resolve; f = resolve('Qwen-7B', hub={hub!r}); print(f.source, f.path)"
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )


def test_download_then_cache(hub: tuple[type[Hub], str], tmp_path: Path) -> None:
    handler, endpoint = hub
    done = resolve_there(endpoint, tmp_path, "huggingface")
    assert done.returncode == 0, done.stderr
    source, path = done.stdout.split()
    assert source == "huggingface" and not done.stderr, "quiet when not a terminal"
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors", "qwen.tiktoken"]
    assert (Path(path) / "model.safetensors").read_bytes() == handler.files["model.safetensors"]
    assert not any("modeling_qwen.py" in p for p in handler.asked)
    handler.asked.clear()
    again = resolve_there(endpoint, tmp_path, "huggingface")
    assert again.stdout.split() == ["hf-cache", path] and not handler.asked


def test_corrupted_on_the_way(hub: tuple[type[Hub], str], tmp_path: Path) -> None:
    handler, endpoint = hub
    handler.corrupt = True
    done = resolve_there(endpoint, tmp_path, "huggingface")
    assert done.returncode and "is not what was published (sha256" in done.stderr
    handler.corrupt = False
    assert resolve_there(endpoint, tmp_path, "huggingface").returncode == 0, "the bad file was removed"
