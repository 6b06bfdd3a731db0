"""The compilers of csrc/gpu, found on this machine and run: NVRTC, nvcc, HIPRTC, hipcc, and g++ for the emulator.

Plain standard library and no import of qwen_rt, so that setup.py uses it before anything is installed. Looking for a
compiler loads libraries and reads versions; it touches no device.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

CUDA_ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
"""What is compiled ahead and checked by tests: Turing, A100, A10/3090, L4/4090, H100/H200, B200, RTX 50."""

HIP_ARCHS = ("gfx906", "gfx908", "gfx90a")
"""What public HIP compilers know of the wave64 family; gfx926/928/936 need the compiler of Hygon's DTK."""

MAX_BLOCK = 256  # threads: the default block, and what hipcc may assume of a kernel without bounds

_TIMEOUT = 600  # seconds one compiler run may take


class CompileFailed(Exception):
    """A compiler is absent, does not know the architecture, or refused the source; the message is its own."""


# -- sources -------------------------------------------------------------------------------------------------------
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def modules(root: Path) -> tuple[str, ...]:
    """Names of the modules in `root`: one .cu file each, sorted."""
    return tuple(sorted(p.stem for p in root.glob("*.cu")))


def source_files(root: Path, start: Path) -> list[Path]:
    """`start` and every file of `root` it includes by quotes, directly or not, whatever the #if around; sorted."""
    found, todo = set(), [start.resolve()]
    base = root.resolve()
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for name in _INCLUDE.findall(path.read_text(encoding="utf-8")):
            for target in (path.parent / name, base / name):
                if target.is_file() and target.resolve().is_relative_to(base):
                    todo.append(target.resolve())
                    break
    return sorted(found)


def source_hash(root: Path, start: Path) -> str:
    """sha256 over names and contents of source_files()."""
    digest = hashlib.sha256()
    for path in source_files(root, start):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root.resolve())}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def defines_options(defines: Mapping[str, object]) -> list[str]:
    """{"A": 1} -> ["-DA=1"], sorted, so that equal definitions give equal options."""
    return [f"-D{name}={value}" for name, value in sorted(defines.items())]


# -- what a compiler is --------------------------------------------------------------------------------------------
class Compiler(Protocol):
    """One compiler found on this machine."""

    @property
    def name(self) -> str:
        """Its kind and version, for people: "nvrtc 13.0"."""
        ...

    @property
    def identity(self) -> str:
        """Whatever tells two builds of it apart; part of every cache key."""
        ...

    def options(self, arch: str, defines: Mapping[str, object]) -> list[str]:
        """Command-line options without paths of this machine; part of every cache key."""
        ...

    def compile(self, root: Path, module: str, arch: str, defines: Mapping[str, object]) -> tuple[bytes, str]:
        """(image, the compiler's messages) of `root`/`module`.cu. Raises CompileFailed."""
        ...


def run(command: Sequence[str], timeout: float = _TIMEOUT, what: str = "") -> str:
    """Run a compiler (`what`, for messages); its output and errors together. Raises CompileFailed with the errors."""
    what = what or _tool(command)
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise CompileFailed(f"{what} did not run: {e}") from e
    if done.returncode:
        how = f"failed with status {done.returncode}" if done.returncode > 0 else f"crashed (signal {-done.returncode})"
        raise CompileFailed(f"{what} {how}:\n{excerpt(done.stdout)}")
    return done.stdout


def _tool(command: Sequence[str]) -> str:
    """The program of a command, behind `env NAME=VALUE`."""
    words = [w for w in command if Path(w).name != "env" and not re.match(r"\w+=", w)]
    return Path(words[0]).name


def excerpt(log: str, lines: int = 12) -> str:
    """The lines of a compiler's log that say what is wrong."""
    every = [x for x in log.splitlines() if x.strip()]
    errors = [i for i, x in enumerate(every) if re.search(r"\b(error|fatal|undefined)\b", x, re.IGNORECASE)]
    first = errors[0] if errors else max(0, len(every) - lines)
    return "\n".join(every[first : first + lines]) or "(no message)"


def _first_file(candidates: Sequence[Path]) -> Path | None:
    return next((p for p in candidates if p.is_file()), None)


def site_packages() -> list[Path]:
    """Folders that hold installed packages: where NVIDIA's wheels put their libraries and headers."""
    found = [Path(p) for p in sys.path if p] + [Path(sysconfig.get_path(k)) for k in ("purelib", "platlib")]
    return [p for p in dict.fromkeys(found) if p.is_dir()]


# -- NVIDIA --------------------------------------------------------------------------------------------------------
def arch_number(arch: str) -> int:
    """ "sm_90a" -> 90. CompileFailed for anything but sm_NN."""
    match = re.fullmatch(r"sm_(\d+)([af]?)", arch)
    if not match:
        raise CompileFailed(f"{arch!r} is not a CUDA architecture (sm_NN)")
    return int(match[1])


class Nvrtc:
    """NVIDIA's run-time compiler library, by ctypes: it needs no driver, no toolkit, and our sources no header."""

    def __init__(self, library: Path | str) -> None:
        """Load `library`; CompileFailed when that does not work."""
        try:
            self._lib = ctypes.CDLL(str(library))
            self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        except (OSError, AttributeError) as e:
            raise CompileFailed(f"{library} does not load: {e}") from e
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        self.name = f"nvrtc {major.value}.{minor.value}"
        path = Path(library)
        size = path.stat().st_size if path.is_file() else 0
        self.identity = f"{self.name}, {path.name}, {size} bytes"

    def _check(self, function: str, *args: object) -> None:
        if status := getattr(self._lib, function)(*args):
            text = self._lib.nvrtcGetErrorString(status)
            raise CompileFailed(f"{function}: {(text or b'?').decode()} ({status})")

    def architectures(self) -> list[int]:
        """Compute capabilities it compiles for: [75, 80, ...]."""
        count = ctypes.c_int()
        self._check("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        values = (ctypes.c_int * count.value)()
        self._check("nvrtcGetSupportedArchs", values)
        return sorted(values)

    def options(self, arch: str, defines: Mapping[str, object]) -> list[str]:
        """Options of one compilation; PTX of its newest architecture for cards newer than it knows."""
        known, wanted = self.architectures(), arch_number(arch)
        if wanted in known:
            target = arch
        else:
            older = [k for k in known if k < wanted]
            if not older or wanted < max(known):
                raise CompileFailed(f"{self.name} does not know {arch}: it compiles for {', '.join(map(str, known))}")
            target = f"compute_{max(older)}"
        return [f"--gpu-architecture={target}", "-std=c++17", "--ptxas-options=-v", *defines_options(defines)]

    def compile(self, root: Path, module: str, arch: str, defines: Mapping[str, object]) -> tuple[bytes, str]:
        """A cubin, or zero-terminated PTX where options() had to ask for that."""
        options = self.options(arch, defines)
        words = [o.encode() for o in [*options, f"-I{root}"]]
        source = (root / f"{module}.cu").read_bytes()
        program = ctypes.c_void_p()
        self._check("nvrtcCreateProgram", ctypes.byref(program), source, f"{module}.cu".encode(), 0, None, None)
        try:
            status = self._lib.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
            log = self._take(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                text = self._lib.nvrtcGetErrorString(status).decode()
                raise CompileFailed(f"{self.name} on {module}.cu for {arch}: {text}\n{excerpt(log)}")
            return self._take(program, "PTX" if "compute_" in options[0] else "CUBIN"), log
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _take(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(max(1, size.value))
        self._check(f"nvrtcGet{what}", program, buffer)
        return buffer.raw[: size.value]


def find_nvrtc(toolkits: Sequence[Path] = (), prefer_major: int | None = None) -> list[Nvrtc]:
    """Every NVRTC that loads: NVIDIA's wheels, the environment's lib, CUDA toolkits, the system's path.

    The CUDA major version `prefer_major` (what torch was built for) comes first, then newer before older. A newer
    one than the driver makes images that driver cannot load.
    """
    files: list[Path | str] = []
    for site in site_packages():
        for pattern in ("nvidia/cu*/lib/libnvrtc.so.*", "nvidia/cuda_nvrtc/lib/libnvrtc.so.*"):
            files += sorted(site.glob(pattern))
    for folder in [Path(sys.prefix) / "lib", *(t / lib for t in toolkits for lib in ("lib64", "lib"))]:
        files += sorted(folder.glob("libnvrtc.so.*"))
    files += ["libnvrtc.so.13", "libnvrtc.so.12"]
    found: dict[tuple[int, int], Nvrtc] = {}
    for file in files:
        if "alt" in Path(file).name:
            continue
        try:
            compiler = Nvrtc(file)
        except CompileFailed:
            continue
        found.setdefault(compiler.version, compiler)
    return sorted(found.values(), key=lambda c: (c.version[0] == prefer_major, c.version), reverse=True)


@dataclass(frozen=True)
class Nvcc:
    """NVIDIA's ahead-of-time compiler."""

    path: Path
    version: tuple[int, int]

    @property
    def name(self) -> str:
        """Kind and version."""
        return f"nvcc {self.version[0]}.{self.version[1]}"

    @property
    def identity(self) -> str:
        """As name: a toolkit's release fixes its compiler."""
        return self.name

    def architectures(self) -> list[int]:
        """Compute capabilities it compiles for."""
        return sorted({int(x) for x in re.findall(r"sm_(\d+)\b", run([str(self.path), "--list-gpu-code"], 60))})

    def options(self, arch: str, defines: Mapping[str, object]) -> list[str]:
        """Options of one compilation."""
        arch_number(arch)
        return ["-cubin", f"-arch={arch}", "-O3", "-std=c++17", "-Xptxas", "-v", *defines_options(defines)]

    def compile(self, root: Path, module: str, arch: str, defines: Mapping[str, object]) -> tuple[bytes, str]:
        """A cubin."""
        if arch_number(arch) not in self.architectures():
            raise CompileFailed(f"{self.name} does not know {arch}")
        return _ahead([str(self.path), *self.options(arch, defines)], root, module, "cubin")


def find_nvcc(toolkits: Sequence[Path] = ()) -> Nvcc | None:
    """nvcc of a toolkit, or of PATH."""
    on_path = shutil.which("nvcc")
    path = _first_file([*(t / "bin/nvcc" for t in toolkits), *([Path(on_path)] if on_path else [])])
    if path is None:
        return None
    try:
        version = re.search(r"release (\d+)\.(\d+)", run([str(path), "--version"], 60))
    except CompileFailed:
        return None
    return Nvcc(path, (int(version[1]), int(version[2]))) if version else None


# -- AMD and Hygon -------------------------------------------------------------------------------------------------
def _gfx(arch: str) -> str:
    if not re.fullmatch(r"gfx[0-9a-f]{3,4}", arch):
        raise CompileFailed(f"{arch!r} is not a HIP architecture (gfxNNN)")
    return arch


class Hiprtc:
    """HIP's run-time compiler library; in some releases a part of the HIP runtime."""

    def __init__(self, library: Path | str) -> None:
        """Load `library`; CompileFailed when that does not work or it holds no compiler."""
        try:
            self._lib = ctypes.CDLL(str(library))
            self._lib.hiprtcGetErrorString.restype = ctypes.c_char_p
        except (OSError, AttributeError) as e:
            raise CompileFailed(f"{library} does not serve as HIPRTC: {e}") from e
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check("hiprtcVersion", ctypes.byref(major), ctypes.byref(minor))
        path = Path(library)
        size = path.stat().st_size if path.is_file() else 0
        self.library = str(library)
        self.name = f"hiprtc {major.value}.{minor.value}"
        self.identity = f"{self.name}, {path.resolve().name}, {size} bytes"

    def _check(self, function: str, *args: object) -> None:
        if status := getattr(self._lib, function)(*args):
            text = self._lib.hiprtcGetErrorString(status)
            raise CompileFailed(f"{function}: {(text or b'?').decode()} ({status})")

    def options(self, arch: str, defines: Mapping[str, object]) -> list[str]:
        """Options of one compilation."""
        return [f"--offload-arch={_gfx(arch)}", "-O3", "-std=c++17", *defines_options(defines)]

    def compile(self, root: Path, module: str, arch: str, defines: Mapping[str, object]) -> tuple[bytes, str]:
        """A code object, made in a child process: HIPRTC 5.2 crashes on an architecture it does not know."""
        with tempfile.TemporaryDirectory(prefix="qwen-rt-") as folder:
            out = Path(folder) / f"{module}.co"
            child = [sys.executable, "-I", str(Path(__file__).resolve()), self.library]
            rest = [str(root / f"{module}.cu"), str(out), *self.options(arch, defines), f"-I{root}"]
            log = run([*child, *rest], what=f"{self.name} for {arch}")
            return out.read_bytes(), log

    def compile_here(self, source: Path, options: Sequence[str]) -> tuple[bytes, str]:
        """(code object, messages) of a file, in this process."""
        words = [o.encode() for o in options]
        program = ctypes.c_void_p()  # one an architecture: a second compilation of a program fails
        self._check(
            "hiprtcCreateProgram", ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None
        )
        try:
            status = self._lib.hiprtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
            log = self._log(program)
            if status:
                text = self._lib.hiprtcGetErrorString(status).decode()
                raise CompileFailed(f"{self.name} on {source.name}: {text}\n{excerpt(log)}")
            size = ctypes.c_size_t()
            self._check("hiprtcGetCodeSize", program, ctypes.byref(size))
            buffer = ctypes.create_string_buffer(max(1, size.value))
            self._check("hiprtcGetCode", program, buffer)
            return buffer.raw[: size.value], log
        finally:
            self._lib.hiprtcDestroyProgram(ctypes.byref(program))

    def _log(self, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self._check("hiprtcGetProgramLogSize", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value + 1)
        if size.value:
            self._check("hiprtcGetProgramLog", program, buffer)
        return buffer.value.decode(errors="replace")


def _name_length(path: Path) -> int:
    return len(path.name)


def find_hiprtc(roots: Sequence[Path] = ()) -> Hiprtc | None:
    """The first library with a HIPRTC in it: of a ROCm or DTK installation, then of the system's path."""
    stems = ("libhiprtc.so", "libamdhip64.so", "libgalaxyhip.so")
    folders = [root / lib for root in roots for lib in ("lib", "lib64", "hip/lib")]
    folders += [Path("/usr/lib") / str(sysconfig.get_config_var("MULTIARCH") or "")]
    files: list[Path | str] = []
    for folder in folders:
        for stem in stems:
            found: list[Path] = sorted(folder.glob(f"{stem}*"), key=_name_length)  # the plain name before versions
            files += found
    for file in [*files, *stems]:
        try:
            return Hiprtc(file)
        except CompileFailed:
            continue
    return None


@dataclass(frozen=True)
class Hipcc:
    """HIP's ahead-of-time compiler driver, forced to its own platform (it would take nvcc from PATH otherwise)."""

    path: Path
    version: str

    @property
    def name(self) -> str:
        """Kind and version."""
        return f"hipcc {self.version.splitlines()[0] if self.version else '?'}"

    @property
    def identity(self) -> str:
        """Everything `hipcc --version` prints, clang's version included."""
        return self.version

    def options(self, arch: str, defines: Mapping[str, object]) -> list[str]:
        """Options of one compilation."""
        bound = f"--gpu-max-threads-per-block={MAX_BLOCK}"
        target = f"--offload-arch={_gfx(arch)}"
        return ["-x", "hip", "--genco", target, "-O3", "-std=c++17", bound, *defines_options(defines)]

    def compile(self, root: Path, module: str, arch: str, defines: Mapping[str, object]) -> tuple[bytes, str]:
        """A code object, as an offload bundle."""
        return _ahead([*_amd(self.path), *self.options(arch, defines)], root, module, "co")


def _amd(hipcc: Path) -> list[str]:
    """The command that runs `hipcc` for AMD's platform, whatever the caller's environment says."""
    return ["env", "HIP_PLATFORM=amd", str(hipcc)]


def find_hipcc(roots: Sequence[Path] = ()) -> Hipcc | None:
    """hipcc of a ROCm or DTK installation, or of PATH."""
    on_path = shutil.which("hipcc")
    path = _first_file([*(r / "bin/hipcc" for r in roots), *([Path(on_path)] if on_path else [])])
    if path is None:
        return None
    try:
        text = run([*_amd(path), "--version"], 60)
    except CompileFailed:
        return None
    lines = [x.strip() for x in text.splitlines() if re.search(r"version", x, re.IGNORECASE)]
    return Hipcc(path, "\n".join(x.removeprefix("HIP version: ") for x in lines))


def hip_archs(hipcc: Hipcc) -> tuple[str, ...]:
    """What to prebuild with `hipcc`: DTK's knows Hygon's own parts too."""
    dtk = any("dtk" in part for part in hipcc.path.resolve().parts)
    return (*HIP_ARCHS, "gfx926", "gfx928", "gfx936") if dtk else HIP_ARCHS


def _ahead(command: list[str], root: Path, module: str, suffix: str) -> tuple[bytes, str]:
    """Run an ahead-of-time compiler on a module; (image, log)."""
    with tempfile.TemporaryDirectory(prefix="qwen-rt-") as folder:
        out = Path(folder) / f"{module}.{suffix}"
        log = run([*command, f"-I{root}", str(root / f"{module}.cu"), "-o", str(out)])
        if not out.is_file():
            raise CompileFailed(f"{_tool(command)} left no image of {module}.cu:\n{excerpt(log)}")
        return out.read_bytes(), log


# -- the host ------------------------------------------------------------------------------------------------------
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")


@dataclass(frozen=True)
class Gxx:
    """g++ (or clang++), which compiles the device sources against the emulator of csrc/gpu/emu."""

    path: Path
    version: str

    @property
    def name(self) -> str:
        """The first line of its --version."""
        return self.version.splitlines()[0]

    @property
    def identity(self) -> str:
        """All of --version and the machine it compiles for."""
        return f"{self.version}\n{sysconfig.get_platform()}"

    def options(self, warp: int, sanitize: bool, mma: bool = True) -> list[str]:
        """Options of one object; mma: the device has matrix units.

        Two warp sizes live in one process: nothing may be shared between the libraries. Sanitized code is not
        optimised: it compiles in half the time, and no access is optimised away.
        """
        apart = ["-fPIC", "-fno-gnu-unique"] if "clang" not in self.version else ["-fPIC"]
        warnings = ["-Wall", "-Wextra", "-Wno-attributes", "-Wno-unknown-pragmas"]
        level = ["-O0", *SANITIZE] if sanitize else ["-O2"]
        defines = ["-DQRT_EMU", f"-DQRT_WARP={warp}", *([] if mma else ["-DQRT_HAS_MMA=0"])]
        return [*level, "-std=c++17", "-ffp-contract=off", *apart, *warnings, *defines]

    def object(self, root: Path, source: Path, options: Sequence[str]) -> tuple[bytes, str]:
        """(object file, messages) of one source. Raises CompileFailed."""
        with tempfile.TemporaryDirectory(prefix="qwen-rt-") as folder:
            out = Path(folder) / f"{source.stem}.o"
            command = [str(self.path), *options, "-x", "c++", "-c", str(source)]
            log = run([*command, f"-I{root}", "-o", str(out)])
            return out.read_bytes(), log

    def link(self, objects: Mapping[str, bytes], sanitize: bool) -> bytes:
        """A shared library of named object files. Raises CompileFailed."""
        with tempfile.TemporaryDirectory(prefix="qwen-rt-") as folder:
            files = []
            for name, data in sorted(objects.items()):
                files.append(Path(folder) / f"{name}.o")
                files[-1].write_bytes(data)
            out = Path(folder) / "lib.so"
            command = [str(self.path), "-shared", "-Wl,-Bsymbolic", *(SANITIZE if sanitize else ())]
            run([*command, *map(str, files), "-pthread", "-o", str(out)])
            return out.read_bytes()


def find_gxx() -> Gxx | None:
    """g++, else c++ or clang++, of PATH."""
    for program in ("g++", "c++", "clang++"):
        path = shutil.which(program)
        if path is None:
            continue
        try:
            return Gxx(Path(path), run([path, "--version"], 60).strip())
        except CompileFailed:
            continue
    return None


# -- prebuilding (setup.py) ----------------------------------------------------------------------------------------
def prebuild(
    root: Path, out: Path, jobs: Sequence[tuple[Compiler, str]], workers: int, say: Callable[[str], None] = print
) -> dict[str, object]:
    """Compile every module of `root` for each (compiler, arch) into `out`/<arch>/; returns the manifest.

    A module that does not compile for an architecture is left out and named by `say`: it is compiled at first use.
    """
    from concurrent.futures import ThreadPoolExecutor

    def one(job: tuple[Compiler, str, str]) -> tuple[str, dict[str, object]] | None:
        compiler, arch, module = job
        try:
            data, _ = compiler.compile(root, module, arch, {})
        except CompileFailed as e:
            say(f"qwen-rt: {module} is not prebuilt for {arch}: {e}")
            return None
        name = f"{arch}/{module}.{'cubin' if arch.startswith('sm_') else 'co'}"
        (out / arch).mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
        entry: dict[str, object] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "source": source_hash(root, root / f"{module}.cu"),
            "compiler": compiler.name,
        }
        return name, entry

    todo = [(compiler, arch, module) for compiler, arch in jobs for module in modules(root)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return {"format": 1, "images": dict(r for r in pool.map(one, todo) if r)}


def main(arguments: Sequence[str]) -> int:
    """The child of Hiprtc.compile: LIBRARY SOURCE OUT OPTION..., messages on standard output."""
    library, source, out, *options = arguments
    try:
        data, log = Hiprtc(library).compile_here(Path(source), options)
    except CompileFailed as e:
        print(e)
        return 1
    Path(out).write_bytes(data)
    print(log)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
