"""From a device name to an open backend: probing, the order of "auto", plugins, and the reason for every no.

A package may say in a module `probe` of its own what it finds, without torch where there is no device: torch's import
costs every start more than all the rest.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qwen_rt import config
from qwen_rt.backends.base import Backend, Probe
from qwen_rt.dtypes import DType
from qwen_rt.errors import BackendError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "qwen_rt.backends"

BUILTIN = {
    "cuda": "qwen_rt.backends.cuda.backend:CudaBackend",
    "dcu": "qwen_rt.backends.dcu.backend:DcuBackend",
    "ascend": "qwen_rt.backends.ascend.backend:AscendBackend",
    "cpu": "qwen_rt.backends.cpu:CpuBackend",
    "reference": "qwen_rt.backends.reference:ReferenceBackend",
    "null": "qwen_rt.backends.null:NullBackend",
    "cuda-emulated": "qwen_rt.backends.gpu.emulated:CudaEmulated",
    "dcu-emulated": "qwen_rt.backends.gpu.emulated:DcuEmulated",
    "dcu-simt-emulated": "qwen_rt.backends.gpu.emulated:DcuSimtEmulated",
}
"""name -> "module:Class". Nothing is imported before a backend is probed or opened, and the class not before it is
opened where the module's package has a `probe`."""

_ACCELERATORS = ("cuda", "dcu", "ascend")


def _plugins() -> dict[str, EntryPoint]:
    """Third-party backends by lower-case name; built-in names cannot be taken over."""
    from importlib.metadata import entry_points  # 40 ms, for which who names a built-in need not wait

    found = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: (e.name, e.value), reverse=True)
    return {e.name.lower(): e for e in found if e.name.lower() not in BUILTIN and e.name.lower() != "auto"}


def names() -> list[str]:
    """Every backend in the order "auto" tries them; `null` (computes nothing) and the emulated ones are opened by name
    only."""
    return [*_ACCELERATORS, *sorted(_plugins()), "cpu", "reference"]


def backend_class(name: str) -> type[Backend]:
    """The class behind a backend's name; BackendError for an unknown name or a module that does not import."""
    plugin = None if name in BUILTIN else _plugins().get(name)
    if plugin is None and name not in BUILTIN:
        raise BackendError(f"unknown device {name!r}; known devices: auto, {', '.join(names())}")
    try:
        if plugin:
            return plugin.load()
        module, cls = BUILTIN[name].split(":")
        return getattr(importlib.import_module(module), cls)
    except Exception as e:  # whatever a plugin's import does, it is a reason and not a crash
        if isinstance(e, ModuleNotFoundError) and e.name == "torch":
            raise BackendError(torch_missing(name)) from e
        hint = f"; reinstall or remove the package {plugin.dist.name!r}" if plugin and plugin.dist else ""
        raise BackendError(
            f"{plugin.value if plugin else BUILTIN[name]} does not import: {type(e).__name__}: {e}{hint}"
        ) from e


def torch_missing(what: str) -> str:
    """That `what` needs PyTorch, and where to get it."""
    return (
        f"{what} needs PyTorch, which is not installed: `pip install torch` (for a card, the build that fits it: see "
        "pytorch.org/get-started; for dcu the one of Hygon's DTK)"
    )


def probe(name: str) -> Probe:
    """What backend `name` finds on this machine; a failed import or a probe that raises becomes the reason."""
    try:
        return (_own_probe(name) or backend_class(name).probe)()
    except BackendError as e:
        return Probe(reason=str(e))
    except Exception as e:
        return Probe(reason=f"its probe() raised {type(e).__name__}: {e} (a bug of that backend)")


def _own_probe(name: str) -> Callable[[], Probe] | None:
    """probe() of a built-in's package, where that has a module for it."""
    package = BUILTIN.get(name, "").split(":")[0].rpartition(".")[0]
    if not package or importlib.util.find_spec(f"{package}.probe") is None:
        return None
    return importlib.import_module(f"{package}.probe").probe


def probe_all() -> dict[str, Probe]:
    """Every backend's probe, in the order "auto" tries them."""
    return {name: probe(name) for name in names()}


def _auto_candidates() -> Iterator[tuple[str, Probe]]:
    """Backends "auto" may take, in order; `reference` only where the native CPU backend is not usable."""
    cpu_usable = False
    for name in names():
        if name == "reference" and cpu_usable:
            return
        found = probe(name)
        cpu_usable = cpu_usable or (name == "cpu" and found.usable)
        yield name, found


def auto_choice(probes: dict[str, Probe]) -> str | None:
    """The first usable backend of `probe_all()`'s result, or None."""
    return next((name for name, found in probes.items() if found.usable), None)


def parse_device(device: str) -> tuple[str, int | None]:
    """ "cuda:1" -> ("cuda", 1); "cpu" -> ("cpu", None); "auto" takes no index. Raises BackendError."""
    match = re.fullmatch(r"([A-Za-z][\w.-]*)(?::(\d+))?", device.strip())
    if not match or (match[1].lower() == "auto" and match[2]):
        raise BackendError(f"bad device {device!r}; write auto, NAME or NAME:INDEX, e.g. cpu or cuda:1")
    return match[1].lower(), int(match[2]) if match[2] else None


def open_backend(device: str = "auto", *, dtype: DType | None = None) -> tuple[Backend, list[str]]:
    """Open `device` and say what was passed over: (backend, notes).

    `device` is "auto" or name[:index]; QWEN_BACKEND names the device that "auto" means. A named device that is not
    usable, or that cannot compute in `dtype`, is a BackendError with the reason; only "auto" moves on to the next.
    """
    name, index = parse_device(device)
    origin = ""
    wanted = config.Settings.from_env().backend
    if name == "auto" and wanted:
        name, index = parse_device(wanted)
        origin = f" (named by QWEN_BACKEND={wanted})"
    if name != "auto":
        if name not in BUILTIN and name not in _plugins():
            raise BackendError(f"unknown device {name!r}{origin}; known devices: auto, {', '.join(names())}")
        found = probe(name)
        backend = _open(name, index, dtype, found, origin)
        return backend, [*([f"device {name}{origin}"] if origin else []), *_notes(name, found)]

    notes: list[str] = []
    for name, found in _auto_candidates():
        if not found.usable:
            notes.append(f"{name}: {found.reason}")
            continue
        try:
            backend = _open(name, None, dtype, found)
        except BackendError as e:
            notes.append(str(e))
            continue
        return backend, [f"passed over {n}" for n in notes] + [f"{name}: {n}" for n in _notes(name, found)]
    raise BackendError("no device is usable:\n  " + "\n  ".join(notes))


def _notes(name: str, found: Probe) -> list[str]:
    """The probe's notes, and a word where its kernels are not proven on the device."""
    if found.rung == "device":
        return list(found.notes)
    doubt = f"no real device has been seen to run its kernels (evidence: {found.rung}); `qwen-rt doctor {name}` checks"
    return [*found.notes, doubt]


def _open(name: str, index: int | None, dtype: DType | None, found: Probe, origin: str = "") -> Backend:
    if not found.usable:
        raise BackendError(f"{name}{origin} is not usable: {found.reason or 'its probe gave no reason'}")
    if index is None:
        index = found.devices[0].index
    elif index not in {d.index for d in found.devices}:
        have = ", ".join(f"{name}:{d.index} ({d.name})" for d in found.devices)
        raise BackendError(f"{name}:{index}{origin}: no such device; found {have}")
    backend = backend_class(name)(index, dtype)
    if dtype is not None and backend.compute_dtype != dtype:
        offered = ", ".join(backend.caps.compute_dtypes)
        raise BackendError(f"{name}{origin}: does not compute in {dtype}; it offers {offered}")
    return backend
