"""Downloading a repository through huggingface_hub or modelscope: only the files needed, verified, quick to give up."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from qwen_rt.config import Settings
from qwen_rt.errors import HubError
from qwen_rt.hub.local import NOT_WEIGHTS, check_dir, find_gguf, is_gguf_type
from qwen_rt.hub.names import GGUF_TYPES, Reference

LIST_SECONDS = 10.0  # a hub that has not listed a repository by then counts as unreachable
SMALL_FILES = """config.json generation_config.json quantize_config.json quant_config.json tokenizer.json
tokenizer_config.json vocab.json merges.txt qwen.tiktoken special_tokens_map.json added_tokens.json
chat_template.jinja chat_template.json""".split()

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository as its hub lists it."""

    name: str
    size: int | None = None  # bytes
    sha256: str | None = None  # large files only


def download(hub: str, ref: Reference, settings: Settings, *, weights: bool, progress: bool) -> Path:
    """The repository's directory, or its .gguf file when `ref` names a type. HubError with the reason when it fails."""
    files = choose(list_files(hub, ref.repo), ref, weights=weights)
    cache = settings.hf_cache if hub == "huggingface" else settings.modelscope_cache
    check_space(cache, sum(f.size or 0 for f in files))
    path = get_files(hub, ref.repo, [f.name for f in files], cache, progress)
    for f in files:
        verify(path / f.name, f.size, f.sha256 if weights else None, progress=progress)
    if ref.gguf_type:
        return find_gguf(path, ref.gguf_type)
    check_dir(path, weights=weights)
    return path


def list_files(hub: str, repo: str) -> list[RemoteFile]:
    """What a repository holds; HubError with the reason when its hub does not say so soon."""
    lister = {"huggingface": list_huggingface, "modelscope": list_modelscope}[hub]
    try:
        return within(LIST_SECONDS, lambda: lister(repo))
    except ModuleNotFoundError as e:
        package = (e.name or "").split(".")[0]
        raise HubError(f"the {package} package is not installed (pip install {package})") from e
    except Exception as e:
        raise HubError(f"not reachable or no such repository ({brief(e)})") from e


def get_files(hub: str, repo: str, names: list[str], cache: Path, progress: bool) -> Path:
    """Download these files of a repository into `cache`, resuming; returns the directory that then holds them."""
    getter = {"huggingface": get_huggingface, "modelscope": get_modelscope}[hub]
    try:
        return getter(repo, names, cache, progress)
    except Exception as e:
        raise HubError(f"download stopped ({brief(e)}); what has arrived is kept, run again to go on") from e


def choose(files: list[RemoteFile], ref: Reference, *, weights: bool) -> list[RemoteFile]:
    """The files to download: configuration, tokenizer, and weights as safetensors, else .bin; or the one GGUF file."""
    top = [f for f in files if "/" not in f.name]
    if ref.gguf_type:
        found = [f for f in top if is_gguf_type(f.name, ref.gguf_type)]
        types = [t for t in GGUF_TYPES if any(is_gguf_type(f.name, t) for f in top)]
        if not found:
            raise HubError(
                f"the repository has no {ref.gguf_type} file; it has {', '.join(types) or 'no .gguf at all'}"
            )
        if "-of-" in found[0].name:
            raise HubError(
                f"{found[0].name} is split into parts, which is not supported; merge them, or choose another type"
            )
        return found[:1]
    small = [f for f in top if f.name in SMALL_FILES]
    if not any(f.name == "config.json" for f in small):
        ggufs = [t for t in GGUF_TYPES if any(is_gguf_type(f.name, t) for f in top)]
        hint = f"; it holds GGUF files, so name one: {ref.repo}:{ggufs[0]}" if ggufs else ""
        raise HubError(f"the repository has no config.json{hint}")
    if not weights:
        return small
    for ending in (".safetensors", ".bin"):
        if found := [f for f in top if f.name.endswith(ending) and f.name not in NOT_WEIGHTS]:
            return small + found + [f for f in top if f.name.endswith(ending + ".index.json")]
    raise HubError("the repository has no weights (*.safetensors or *.bin)")


def list_huggingface(repo: str) -> list[RemoteFile]:
    """Files of a Hugging Face repository with sizes and hashes."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, files_metadata=True, timeout=LIST_SECONDS)
    return [RemoteFile(s.rfilename, s.size, s.lfs.sha256 if s.lfs else None) for s in info.siblings or []]


def get_huggingface(repo: str, names: list[str], cache: Path, progress: bool) -> Path:
    """Download into the Hugging Face cache, resuming; returns the snapshot's directory."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = not progress and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        return Path(snapshot_download(repo, cache_dir=cache, allow_patterns=[glob.escape(n) for n in names]))
    finally:
        if quiet:
            enable_progress_bars()


def list_modelscope(repo: str) -> list[RemoteFile]:
    """Files of a ModelScope repository with sizes, and hashes where the installed version gives them."""
    from modelscope.hub.api import HubApi
    from modelscope.hub.utils.utils import get_endpoint

    knock(get_endpoint())
    listed: list[dict[str, Any]] = HubApi().get_model_files(repo, recursive=False)
    return [RemoteFile(f["Path"], f.get("Size"), f.get("Sha256")) for f in listed if f.get("Type") != "tree"]


def get_modelscope(repo: str, names: list[str], cache: Path, progress: bool) -> Path:
    """Download into the ModelScope cache, resuming; returns the model's directory."""
    from modelscope.hub.snapshot_download import snapshot_download

    with contextlib.nullcontext() if progress else _silent_stderr():
        return Path(snapshot_download(repo, cache_dir=str(cache), allow_patterns=[glob.escape(n) for n in names]))


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """modelscope has no switch for its bars; they go nowhere when nobody watches."""
    with open("/dev/null" if sys.platform != "win32" else "NUL", "w") as sink, contextlib.redirect_stderr(sink):
        yield


def knock(url: str) -> None:
    """Raise OSError at once when nobody answers at `url`; modelscope itself would retry for long."""
    try:
        urllib.request.urlopen(url, timeout=LIST_SECONDS / 2).close()
    except urllib.error.HTTPError:
        pass  # an answer, whatever it says


def within(seconds: float, call: Callable[[], T]) -> T:
    """call(), or TimeoutError after `seconds` of wall clock (name look-ups and proxies have limits of their own)."""
    result: list[T] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as e:
            error.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if error:
        raise error[0]
    if not result:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return result[0]


def brief(e: BaseException) -> str:
    """An exception as one short line."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {lines[0][:160]}" if lines else type(e).__name__


def check_space(folder: Path, needed: int) -> None:
    """HubError when the disk that holds `folder` has less than `needed` bytes free."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise HubError(
            f"{folder} needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free; "
            "free some space, or put the cache elsewhere (HF_HOME, MODELSCOPE_CACHE, QWEN_RT_CACHE)"
        )


def verify(path: Path, size: int | None, sha256: str | None, *, progress: bool = False) -> None:
    """HubError, the file removed, when it does not have this size and hash (None: not known)."""
    if not path.is_file():
        raise HubError(f"{path.name} did not arrive")
    actual = path.stat().st_size
    wrong = f"{actual} bytes instead of {size}" if size is not None and actual != size else ""
    if not wrong and sha256 is not None and (found := hash_file(path, progress)) != sha256:
        wrong = f"sha256 {found[:16]}... instead of {sha256[:16]}..."
    if wrong:
        target = path.resolve()
        path.unlink()
        target.unlink(missing_ok=True)
        raise HubError(f"{path.name} is not what was published ({wrong}); it was removed, download it again")


def hash_file(path: Path, progress: bool = False) -> str:
    """sha256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as f, bar(f"checking {path.name}", path.stat().st_size, progress) as done:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
            done.update(len(chunk))
    return digest.hexdigest()


def bar(what: str, total: int, progress: bool) -> Any:
    """A progress bar over `total` bytes on stderr, or a silent one."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not progress, leave=False)
