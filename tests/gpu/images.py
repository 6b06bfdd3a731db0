"""Reading what the device compilers made: kernel names of an image, and the resources each kernel takes."""

from __future__ import annotations

import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

_BUNDLE = b"__CLANG_OFFLOAD_BUNDLE__"
_FUNCTION = 2  # symbol type
_LOCAL_BINDING = 0


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of a compute unit."""

    registers: int
    spills: int  # bytes (CUDA) or registers (HIP) kept in memory for lack of registers
    stack: int  # bytes of a thread's private memory
    shared: int = 0  # bytes, the static part
    warp: int = 0
    max_block: int = 0  # threads


def unbundle(data: bytes) -> bytes:
    """The device ELF of a code object, taken out of clang's bundle when it is one."""
    if not data.startswith(_BUNDLE):
        return data
    at = len(_BUNDLE)
    (count,) = struct.unpack_from("<Q", data, at)
    at += 8
    for _ in range(count):
        offset, size, length = struct.unpack_from("<QQQ", data, at)
        triple = data[at + 24 : at + 24 + length]
        at += 24 + length
        if b"amdgcn" in triple:
            return data[offset : offset + size]
    raise AssertionError("a bundle without device code")


def kernel_names(data: bytes) -> set[str]:
    """Names of the kernels in a cubin or a HIP code object, from its ELF symbols."""
    elf = unbundle(data)
    assert elf[:5] == b"\x7fELF\x02", "not a 64-bit ELF"
    (section_offset,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, count = struct.unpack_from("<HH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, section_offset + i * entry_size) for i in range(count)]
    names: set[str] = set()
    for kind, offset, size, link in ((s[1], s[4], s[5], s[6]) for s in sections):
        if kind not in (2, 11):  # SHT_SYMTAB, SHT_DYNSYM
            continue
        strings = sections[link][4]
        for at in range(offset, offset + size, 24):
            name, info, _, section = struct.unpack_from("<IBBH", elf, at)
            text = elf[strings + name : elf.index(b"\0", strings + name)].decode()
            if section == 0 or info >> 4 == _LOCAL_BINDING or text.startswith("$"):  # ptxas's own helpers
                continue
            if text.endswith(".kd"):
                names.add(text.removesuffix(".kd"))
            elif info & 15 == _FUNCTION and struct.unpack_from("<H", elf, 0x12)[0] == 190:  # EM_CUDA
                names.add(text)
    return names


def ptxas_resources(log: str) -> dict[str, Resources]:
    """Kernel -> resources, from `ptxas -v` messages."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.split("'", 1)[0]
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        assert stack and used, f"messages of ptxas on {name} do not read"
        shared = re.search(r"(\d+) bytes smem", part)
        spills = int(stack[2]) + int(stack[3])
        found[name] = Resources(int(used[1]), spills, int(stack[1]), int(shared[1]) if shared else 0)
    return found


def readelf() -> Path | None:
    """llvm-readelf of the compiler's LLVM, newest first."""
    import shutil

    folders = sorted(Path("/usr/lib").glob("llvm-*/bin"), key=lambda p: int(p.parent.name.split("-")[1]), reverse=True)
    folders += [Path("/opt/rocm/llvm/bin"), Path("/opt/dtk/llvm/bin")]
    found = [f / "llvm-readelf" for f in folders if (f / "llvm-readelf").is_file()]
    on_path = shutil.which("llvm-readelf")
    return found[0] if found else Path(on_path) if on_path else None


def amd_resources(data: bytes, tool: Path, folder: Path) -> dict[str, Resources]:
    """Kernel -> resources, from the notes of a code object."""
    file = folder / "image.elf"
    file.write_bytes(unbundle(data))
    text = subprocess.run([str(tool), "--notes", str(file)], capture_output=True, text=True, check=True).stdout
    kernels = text.split("amdhsa.kernels:", 1)[1]
    found = {}
    for part in re.split(r"^  - ", kernels, flags=re.MULTILINE)[1:]:
        fields = dict(re.findall(r"^ {0,4}\.(\w+): +(\S+)$", part, re.MULTILINE))
        fields |= dict(re.findall(r"\A\.(\w+): +(\S+)$", part, re.MULTILINE))
        found[fields["name"].strip("'")] = Resources(
            registers=int(fields["vgpr_count"]),
            spills=int(fields["vgpr_spill_count"]) + int(fields["sgpr_spill_count"]),
            stack=int(fields["private_segment_fixed_size"]),
            shared=int(fields["group_segment_fixed_size"]),
            warp=int(fields["wavefront_size"]),
            max_block=int(fields["max_flat_workgroup_size"]),
        )
    return found


def registered(gxx: Path, root: Path, module: str) -> set[str]:
    """Kernels a module registers with the emulator (QRT_REGISTER), after the preprocessor."""
    command = [str(gxx), "-E", "-P", "-x", "c++", "-std=c++17", "-DQRT_EMU", "-DQRT_WARP=32", f"-I{root}"]
    run = subprocess.run([*command, str(root / f"{module}.cu")], capture_output=True, text=True, check=True)
    return set(re.findall(r"\bqrt_registration_(\w+)\(", run.stdout))
