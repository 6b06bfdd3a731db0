"""From the device sources to an image a driver loads: prebuilt, compiled at first use and cached, or a reason.

    image("norm", "sm_90a")          the module's cubin or code object, by the first route that works
    emu_library(64)                  the same sources as a host library over the emulator, warp size 64

Routes, in order: what setup.py built into the package; an entry of the disk cache; NVRTC, then nvcc (CUDA);
HIPRTC, then `hipcc --genco` (ROCm, DTK). A cache entry carries its own key and hash: one that is stale, foreign or
damaged is built again, never loaded. Nothing here touches a device, and importing it does nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout

from qwen_rt.backends.gpu import compilers
from qwen_rt.backends.gpu.compilers import CompileFailed, Compiler
from qwen_rt.config import Settings, physical_cores
from qwen_rt.errors import BackendError

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[2]  # qwen_rt/
_MAGIC = b"qwen-rt kernel 1\n"
_LOCK_SECONDS = 900  # another process compiles that long at most
_DAY = 86400.0
MAX_UNUSED = 90 * _DAY  # seconds after which an entry of the cache is deleted
MAX_CACHE_BYTES = 1 << 30  # all modules of one card are some 3 MB; the emulator's libraries some 30

NVRTC_HINT = "pip install 'qwen-rt[cuda]' (nvidia-cuda-nvrtc and nvidia-cuda-runtime), or install a CUDA toolkit"
HIP_HINT = "source /opt/dtk/env.sh (DTK), or install ROCm's hipcc"


@dataclass(frozen=True)
class Image:
    """One module for one architecture."""

    module: str
    arch: str
    data: bytes  # cubin, PTX (zero-terminated) or HIP code object
    route: str  # "prebuilt (nvcc 13.0)", "nvrtc 13.0", "hipcc 5.2, cached": for report() and `qwen-rt devices`
    log: str = ""  # the compiler's messages (resource usage); empty unless compiled just now


# -- sources -------------------------------------------------------------------------------------------------------
def source_root() -> Path:
    """The folder of the device sources: inside an installed package, beside an editable one. Raises BackendError."""
    for folder in (PACKAGE / "_gpu_src", PACKAGE.parent / "csrc" / "gpu"):
        if (folder / "compat.h").is_file():
            return folder
    raise BackendError(
        f"the GPU sources are missing: neither {PACKAGE / '_gpu_src'} nor {PACKAGE.parent / 'csrc/gpu'} "
        "holds compat.h; reinstall qwen-rt"
    )


def modules(root: Path | None = None) -> tuple[str, ...]:
    """Names of all device modules."""
    return compilers.modules(root or source_root())


# -- the disk cache ------------------------------------------------------------------------------------------------
class Cache:
    """Files of `folder`, each with a header that names its key and the hash of its contents."""

    def __init__(self, folder: Path) -> None:
        """Nothing is created until something is stored."""
        self.folder = folder

    def path(self, label: str, key: str) -> Path:
        """Where the entry of a key lies."""
        return self.folder / f"{label}-{key[:32]}.bin"

    def read(self, label: str, key: str) -> bytes | None:
        """The contents stored under `key`; None when absent. What is not exactly that entry is deleted."""
        path = self.path(label, key)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        data, why = _unwrap(raw, key)
        if data is None:
            log.warning("kernel cache: %s is %s; it is built again", path, why)
            path.unlink(missing_ok=True)
        else:
            _used(path)
        return data

    def prune(self) -> None:
        """Delete what nobody used for MAX_UNUSED, then what was used longest ago until MAX_CACHE_BYTES are left.

        What was used within a day stays whatever its size: a process may be about to open it. Deleting what another
        process maps, reads or holds as a lock does it no harm: at worst something is compiled once more.
        """
        now, found = time.time(), []
        with suppress(OSError):
            for path in self.folder.iterdir():
                if path.suffix in _OURS and path.is_file():
                    with suppress(OSError):
                        about = path.stat()
                        found.append((about.st_mtime, about.st_size, path))
        left = sum(size for _, size, _ in found)
        for used, size, path in sorted(found):
            if now - used <= _DAY or (now - used <= MAX_UNUSED and left <= MAX_CACHE_BYTES):
                break
            with suppress(OSError):
                path.unlink()
                left -= size

    def write(self, label: str, key: str, data: bytes) -> str:
        """Store `data`, whole or not at all; returns "" or why it was not stored."""
        header = json.dumps({"key": key, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)})
        try:
            _replace(self.path(label, key), _MAGIC + header.encode() + b"\n" + data)
        except OSError as e:
            log.warning("kernel cache: %s is not usable: %s", self.folder, e)
            return f"not cached: {e}"
        return ""

    @contextmanager
    def lock(self, label: str, key: str) -> Iterator[None]:
        """Held by one process at a time, so that one compiles and the others read; given up where locks fail."""
        guard = FileLock(str(self.path(label, key)) + ".lock", timeout=_LOCK_SECONDS)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            guard.acquire()
        except (OSError, Timeout, NotImplementedError) as e:
            log.warning("kernel cache: no lock in %s: %s", self.folder, e)
        try:
            yield
        finally:
            guard.release()


_OURS = (".bin", ".so", ".json", ".lock", ".part")


def _used(*paths: Path) -> None:
    """Note that entries were used now, for prune(); a cache that cannot be written is served all the same."""
    for path in paths:
        with suppress(OSError):
            os.utime(path)


def _unwrap(raw: bytes, key: str) -> tuple[bytes | None, str]:
    """(contents, "") of an entry's bytes, or (None, what is wrong with them)."""
    if not raw.startswith(_MAGIC):
        return None, "not a cache entry of this version"
    header, found, data = raw[len(_MAGIC) :].partition(b"\n")
    try:
        fields = json.loads(header) if found else None
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or fields.keys() != {"key", "sha256", "size"}:
        return None, "damaged (no header)"
    if fields["key"] != key:
        return None, "another key's entry"
    if fields["size"] != len(data) or fields["sha256"] != hashlib.sha256(data).hexdigest():
        return None, "damaged (wrong hash)"
    return data, ""


def _replace(path: Path, data: bytes) -> None:
    """Write `path` atomically: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def cache(settings: Settings | None = None) -> Cache:
    """The kernel cache: `kernels` in the folder QWEN_RT_CACHE names."""
    return Cache((settings or Settings.from_env()).cache / "kernels")


def cache_key(**fields: object) -> str:
    """sha256 over named fields: of the sources, architecture, compiler, options."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


# -- compilers of this machine -------------------------------------------------------------------------------------
def _cuda_roots(settings: Settings) -> tuple[Path, ...]:
    named = [Path(settings.cuda_home)] if settings.cuda_home else []
    return tuple(p for p in [*named, Path("/usr/local/cuda")] if p.is_dir())


def _hip_roots(settings: Settings) -> tuple[Path, ...]:
    named = [Path(settings.rocm_path)] if settings.rocm_path else []
    return tuple(p for p in [*named, Path("/opt/dtk"), Path("/opt/rocm")] if p.is_dir())


def _torch_cuda_major() -> int | None:
    """The CUDA release torch was built for: its libraries, NVRTC among them, are the ones most likely to fit."""
    import torch

    version = getattr(torch.version, "cuda", None)
    return int(version.split(".")[0]) if version else None


@lru_cache
def _nvrtcs(roots: tuple[Path, ...], major: int | None) -> tuple[compilers.Nvrtc, ...]:
    return tuple(compilers.find_nvrtc(roots, major))


_nvcc = lru_cache(compilers.find_nvcc)
_hiprtc = lru_cache(compilers.find_hiprtc)
_hipcc = lru_cache(compilers.find_hipcc)
_gxx = lru_cache(compilers.find_gxx)


def available(arch: str, settings: Settings | None = None) -> tuple[list[Compiler], list[str]]:
    """(compilers that may serve `arch`, in order of use; reasons for those that are not there)."""
    settings = settings or Settings.from_env()
    found: list[Compiler] = []
    reasons = []
    if arch.startswith("sm_"):
        nvrtcs = _nvrtcs(_cuda_roots(settings), _torch_cuda_major())
        found += nvrtcs
        if not nvrtcs:
            reasons.append(f"nvrtc: libnvrtc.so not found; {NVRTC_HINT}")
        if nvcc := _nvcc(_cuda_roots(settings)):
            found.append(nvcc)
        else:
            reasons.append("nvcc: not on PATH, nor in CUDA_HOME")
    else:
        if hiprtc := _hiprtc(_hip_roots(settings)):
            found.append(hiprtc)
        else:
            reasons.append(f"hiprtc: no libhiprtc.so, and no HIP runtime that holds one; {HIP_HINT}")
        if hipcc := _hipcc(_hip_roots(settings)):
            found.append(hipcc)
        else:
            reasons.append(f"hipcc: not on PATH, nor in ROCM_PATH; {HIP_HINT}")
    return found, reasons


# -- images --------------------------------------------------------------------------------------------------------
def cuda_arch(major: int, minor: int) -> str:
    """Compute capability -> the architecture to build for: 9.0 -> "sm_90a" (the only target with its own features)."""
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def image(
    module: str,
    arch: str,
    defines: Mapping[str, object] | None = None,
    *,
    driver_cuda: tuple[int, int] | None = None,
    routes: Sequence[str] | None = None,
    settings: Settings | None = None,
) -> Image:
    """`module` for `arch` ("sm_90a", "gfx928"). driver_cuda: the newest CUDA release the driver serves.

    routes: names to try ("prebuilt", "nvrtc", "nvcc", "hiprtc", "hipcc"); default: all that suit `arch`.
    Raises BackendError that lists the reason of every route.
    """
    settings = settings or Settings.from_env()
    defines = dict(defines or {})
    root = source_root()
    if not (root / f"{module}.cu").is_file():
        raise BackendError(f"there is no device module {module!r}; there are: {', '.join(modules(root))}")
    source = compilers.source_hash(root, root / f"{module}.cu")
    reasons = []

    def wanted(name: str) -> bool:
        return routes is None or name.split()[0] in routes

    if wanted("prebuilt"):
        found, why = _prebuilt(module, arch, defines, source, driver_cuda)
        if found:
            return found
        reasons.append(f"prebuilt: {why}")

    usable, missing = available(arch, settings)
    reasons += [m for m in missing if wanted(m.split(":")[0])]
    store = cache(settings)
    jobs = []
    for compiler in usable:
        if not wanted(compiler.name):
            continue
        try:
            _check_driver(compiler, driver_cuda)
            options = compiler.options(arch, defines)
        except CompileFailed as e:
            reasons.append(_reason(compiler, e))
            continue
        key = cache_key(source=source, module=module, arch=arch, compiler=compiler.identity, options=options)
        if (data := store.read(f"{module}-{arch}", key)) is not None:
            return Image(module, arch, data, f"{compiler.name}, cached")
        jobs.append(compiler)
    for compiler in jobs:
        try:
            return compiled(compiler, module, arch, defines, settings=settings)
        except CompileFailed as e:
            reasons.append(_reason(compiler, e))
    raise BackendError(f"no image of {module!r} for {arch}:\n  " + "\n  ".join(reasons))


def compiled(
    compiler: Compiler,
    module: str,
    arch: str,
    defines: Mapping[str, object] | None = None,
    *,
    settings: Settings | None = None,
) -> Image:
    """`module` by this compiler, from its cache entry where that is intact. Raises CompileFailed."""
    root, store, defines = source_root(), cache(settings), dict(defines or {})
    source = compilers.source_hash(root, root / f"{module}.cu")
    label, options = f"{module}-{arch}", compiler.options(arch, defines)
    key = cache_key(source=source, module=module, arch=arch, compiler=compiler.identity, options=options)
    with store.lock(label, key):
        if (data := store.read(label, key)) is not None:  # perhaps another process was faster
            return Image(module, arch, data, f"{compiler.name}, cached")
        data, messages = compiler.compile(root, module, arch, defines)
        why = store.write(label, key, data)
    store.prune()
    return Image(module, arch, data, f"{compiler.name} ({why})" if why else compiler.name, messages)


def _reason(compiler: Compiler, error: CompileFailed) -> str:
    """A compiler's failure as one line of the list, named once."""
    text = str(error)
    return text if text.startswith(compiler.name) else f"{compiler.name}: {text}"


def _check_driver(compiler: Compiler, driver_cuda: tuple[int, int] | None) -> None:
    """Images of a newer CUDA major release do not load into an older driver: say so before compiling."""
    if driver_cuda and isinstance(compiler, compilers.Nvrtc | compilers.Nvcc):
        _check_release(compiler.version[0], driver_cuda)


def _check_release(major: int, driver_cuda: tuple[int, int]) -> None:
    if major > driver_cuda[0]:
        raise CompileFailed(
            f"the driver serves CUDA {driver_cuda[0]}.{driver_cuda[1]}, too old for images of CUDA {major}; update the "
            f"NVIDIA driver, or pip install nvidia-cuda-nvrtc-cu{driver_cuda[0]} nvidia-cuda-runtime-cu{driver_cuda[0]}"
        )


def _fitting(arch: str) -> list[str]:
    """Architectures whose prebuilt images run on `arch`, best first: itself, then lower ones of the same generation."""
    if not arch.startswith("sm_"):
        return [arch]
    number = compilers.arch_number(arch)
    return list(dict.fromkeys([arch, *(f"sm_{n}" for n in range(number, number // 10 * 10 - 1, -1))]))


def _prebuilt(
    module: str, arch: str, defines: Mapping[str, object], source: str, driver_cuda: tuple[int, int] | None
) -> tuple[Image | None, str]:
    """The package's own image, or why there is none that may be used."""
    folder = PACKAGE / "_prebuilt"
    try:
        images = json.loads((folder / "manifest.json").read_text())["images"]
    except FileNotFoundError:
        return None, "this installation holds no prebuilt kernels"
    except (OSError, ValueError, KeyError) as e:
        return None, f"its manifest does not read: {type(e).__name__}: {e}"
    if defines:
        return None, f"built without {' '.join(compilers.defines_options(defines))}"
    why = f"not built for {arch}"
    for candidate in _fitting(arch):
        name = f"{candidate}/{module}.{'cubin' if arch.startswith('sm_') else 'co'}"
        entry = images.get(name)
        if entry is None:
            continue
        try:
            compiler = str(entry["compiler"])
            if entry["source"] != source:
                why = f"{name} was built from other sources"
                continue
            if driver_cuda and compiler.startswith(("nvcc ", "nvrtc ")):
                _check_release(int(compiler.split()[1].split(".")[0]), driver_cuda)
            data = (folder / name).read_bytes()
        except (OSError, KeyError, ValueError, TypeError, CompileFailed) as e:
            why = f"{name}: {e}"
            continue
        if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
            why = f"{name} is damaged (wrong hash)"
            continue
        return Image(module, arch, data, f"prebuilt {candidate} ({compiler})"), ""
    return None, why


# -- the emulator --------------------------------------------------------------------------------------------------
def emu_library(
    warp: int,
    sanitize: bool = False,
    *,
    mma: bool = True,
    only: Sequence[str] | None = None,
    settings: Settings | None = None,
) -> Path:
    """The shared library of every module over the emulator, at warp size 32 or 64; built when not in the cache.

    sanitize: with AddressSanitizer and UBSan (load it into a process with libasan preloaded). mma: for a device with
    matrix units; False: the code of one without (gfx906). only: these modules.
    Objects are cached one by one, so that a changed module is compiled alone. Raises BackendError with the compiler's
    message.
    """
    if warp not in (32, 64):
        raise BackendError(f"the emulator has warp sizes 32 and 64, not {warp}")
    gxx = _gxx()
    if gxx is None:
        raise BackendError("the emulator needs a C++17 compiler: apt install g++ (or clang++)")
    root = source_root()
    store = cache(settings)
    kind = f"emu{warp}{'' if mma else '-simt'}{'-san' if sanitize else ''}"
    options = gxx.options(warp, sanitize, mma)
    sources = [*sorted((root / "emu").glob("*.cpp")), *(root / f"{m}.cu" for m in only or modules(root))]

    def key_of(source: Path) -> str:
        return cache_key(source=compilers.source_hash(root, source), compiler=gxx.identity, options=options)

    keys = {source.name: key_of(source) for source in sources}
    key = cache_key(objects=keys, compiler=gxx.identity, options=options)

    def build(source: Path) -> bytes:
        label = f"{kind}-{source.stem}"
        data = store.read(label, keys[source.name])
        if data is None:
            data, messages = gxx.object(root, source, options)
            if messages.strip():
                log.warning("g++ on %s:\n%s", source.name, messages)
            store.write(label, keys[source.name], data)
        return data

    library = store.folder / f"lib{kind}-{key[:32]}.so"
    with store.lock(kind, key):
        if _library_intact(library, key):
            _used(library, library.with_suffix(".json"))
            return library
        try:
            with ThreadPoolExecutor(physical_cores()) as pool:
                objects = dict(zip([s.name for s in sources], pool.map(build, sources), strict=True))
            data = gxx.link(objects, sanitize)
        except CompileFailed as e:
            raise BackendError(f"the emulator does not build: {e}") from e
        try:
            _replace(library, data)
            _replace(library.with_suffix(".json"), _library_note(key, data))
        except OSError as e:
            raise BackendError(f"the emulator cannot be stored in {store.folder}: {e}; set QWEN_RT_CACHE") from e
    store.prune()
    return library


def _library_note(key: str, data: bytes) -> bytes:
    return json.dumps({"key": key, "sha256": hashlib.sha256(data).hexdigest()}).encode()


def _library_intact(library: Path, key: str) -> bool:
    """True when the library is there and is what was built for `key`; a damaged one is not mapped."""
    try:
        return library.with_suffix(".json").read_bytes() == _library_note(key, library.read_bytes())
    except OSError:
        return False
