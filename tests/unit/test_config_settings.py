"""Settings from the environment, and the cores a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen_rt.config import Settings, physical_cores
from qwen_rt.errors import ConfigError


def test_defaults() -> None:
    s = Settings.from_env({})
    assert (s.backend, s.hub, s.log) == (None, "auto", "warning")
    home = Path("~/.cache").expanduser()
    assert (s.cache, s.hf_cache) == (home / "qwen_rt", home / "huggingface" / "hub")
    assert s.modelscope_cache == home / "modelscope" and s.threads >= 1


def test_values() -> None:
    env = {"QWEN_BACKEND": "cpu", "QWEN_RT_THREADS": "3", "QWEN_RT_HUB": "ModelScope", "QWEN_RT_CACHE": "/c"}
    env |= {"HF_HOME": "/hf", "MODELSCOPE_CACHE": "/ms", "QWEN_RT_LOG": "DEBUG"}
    s = Settings.from_env(env)
    assert (s.backend, s.threads, s.hub, s.cache, s.log) == ("cpu", 3, "modelscope", Path("/c"), "debug")
    assert (s.hf_cache, s.modelscope_cache) == (Path("/hf/hub"), Path("/ms"))
    assert Settings.from_env({"HF_HOME": "/hf", "HF_HUB_CACHE": "/x"}).hf_cache == Path("/x")


def test_offline_flag_of_hugging_face() -> None:
    assert Settings.from_env({"HF_HUB_OFFLINE": "1"}).hub == "offline"
    assert Settings.from_env({"HF_HUB_OFFLINE": "1", "QWEN_RT_HUB": "modelscope"}).hub == "modelscope"
    assert Settings.from_env({"HF_HUB_OFFLINE": "0"}).hub == "auto"


def test_read_when_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_BACKEND", "ascend")
    assert Settings.from_env().backend == "ascend"
    monkeypatch.setenv("QWEN_BACKEND", "")
    assert Settings.from_env().backend is None


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"QWEN_RT_HUB": "github"}, "QWEN_RT_HUB is 'github', but must be auto, huggingface, modelscope or offline"),
        ({"QWEN_RT_THREADS": "many"}, "QWEN_RT_THREADS is 'many'"),
        ({"QWEN_RT_THREADS": "0"}, "QWEN_RT_THREADS"),
        ({"QWEN_RT_THREADS": "-2"}, "QWEN_RT_THREADS"),
        ({"QWEN_RT_LOG": "loud"}, "QWEN_RT_LOG"),
    ],
)
def test_refused(env: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as e:
        Settings.from_env(env)
    assert words in str(e.value)


def machine(root: Path, siblings: dict[int, str], files: dict[str, str]) -> Path:
    for cpu, text in siblings.items():
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = text + "\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs sched_getaffinity")
class TestPhysicalCores:
    @pytest.fixture(autouse=True)
    def eight_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))

    def test_hyper_threads_count_once(self, tmp_path: Path) -> None:
        assert physical_cores(machine(tmp_path, {c: f"{c % 4},{c % 4 + 4}" for c in range(8)}, {})) == 4

    def test_no_topology_means_every_cpu(self, tmp_path: Path) -> None:
        assert physical_cores(tmp_path) == 8

    def test_affinity(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4, 5})
        assert physical_cores(machine(tmp_path, {c: f"{c % 4},{c % 4 + 4}" for c in range(8)}, {})) == 2

    def test_cgroup_v2_quota_of_a_parent(self, tmp_path: Path) -> None:
        files = {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/cpu.max": "250000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        }
        assert physical_cores(machine(tmp_path, {}, files)) == 3

    def test_cgroup_v1_quota(self, tmp_path: Path) -> None:
        files = {
            "proc/self/cgroup": "8:memory:/m\n4:cpu,cpuacct:/d\n",
            "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/m/cpu.max": "1 100000\n",
        }
        assert physical_cores(machine(tmp_path, {}, files)) == 1

    def test_no_quota(self, tmp_path: Path) -> None:
        files = {
            "proc/self/cgroup": "4:cpu:/\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        }
        assert physical_cores(machine(tmp_path, {}, files)) == 8
