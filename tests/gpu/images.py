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
_SIZED, _FRAME_SIZE, _REGISTERS = 0x04, 0x11, 0x2F  # of .nv.info: attributes with a size, and two of them


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of a compute unit."""

    registers: int
    spills: int  # bytes (CUDA) or vector registers (HIP) kept in memory for lack of registers
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


def _sections(elf: bytes) -> tuple[list[tuple[int, ...]], list[str]]:
    """(headers, names) of an ELF's sections; of a header, [1] is the type, [4] offset, [5] size, [6] link."""
    assert elf[:5] == b"\x7fELF\x02", "not a 64-bit ELF"
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, count, strings = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * entry_size) for i in range(count)]
    base = headers[strings][4]
    return headers, [elf[base + h[0] : elf.index(b"\0", base + h[0])].decode() for h in headers]


def kernel_names(data: bytes) -> set[str]:
    """Names of the kernels in a cubin or a HIP code object, from its ELF symbols."""
    elf = unbundle(data)
    sections, _ = _sections(elf)
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


def cubin_resources(data: bytes) -> dict[str, Resources]:
    """Kernel -> resources of a cubin, from its .nv.info attributes and section sizes.

    `spills` is the frame in local memory: registers that did not fit, and arrays that could not be kept in registers.
    """
    sections, names = _sections(data)
    by_name = {name: i for i, name in enumerate(names)}
    symbols = sections[by_name[".symtab"]]
    strings = sections[symbols[6]][4]
    kernels = {n.removeprefix(".text.") for n in names if n.startswith(".text.")} & kernel_names(data)

    def symbol(index: int) -> str:
        at = strings + struct.unpack_from("<I", data, symbols[4] + 24 * index)[0]
        return data[at : data.index(b"\0", at)].decode()

    values: dict[tuple[int, str], int] = {}
    info = sections[by_name[".nv.info"]]
    at, end = info[4], info[4] + info[5]
    while at < end:
        layout, attribute, size = struct.unpack_from("<BBH", data, at)
        if layout == _SIZED and size == 8:
            index, value = struct.unpack_from("<II", data, at + 4)
            values[attribute, symbol(index)] = value
        at += 4 + (size if layout == _SIZED else 0)
    found = {}
    for kernel in kernels:
        shared = by_name.get(f".nv.shared.{kernel}")
        frame = values[_FRAME_SIZE, kernel]
        found[kernel] = Resources(values[_REGISTERS, kernel], frame, frame, sections[shared][5] if shared else 0)
    return found


def ptxas_spills(log: str) -> dict[str, int]:
    """Kernel -> bytes of spill stores and loads, from `ptxas -v` messages."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        assert spills, f"messages of ptxas do not read: {part[:200]}"
        found[part.split("'", 1)[0]] = int(spills[1]) + int(spills[2])
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
    kernels = text.split("amdhsa.kernels:", 1)[1].split("\namdhsa.", 1)[0]
    found = {}
    for part in re.split(r"^  - ", kernels, flags=re.MULTILINE)[1:]:
        fields = dict(re.findall(r"^ {0,4}\.(\w+): +(\S+)$", part, re.MULTILINE))
        fields |= dict(re.findall(r"\A\.(\w+): +(\S+)$", part, re.MULTILINE))
        found[fields["name"].strip("'")] = Resources(
            registers=int(fields["vgpr_count"]),
            spills=int(fields["vgpr_spill_count"]),  # scalar registers spill into lanes of vector registers
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
