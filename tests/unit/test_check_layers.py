"""tools/check_layers.py fires on what it must, and passes the package as it is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_layers.py"
spec = importlib.util.spec_from_file_location("check_layers", TOOL)
assert spec and spec.loader
check_layers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_layers)


def found(tmp_path: Path, where: str, code: str) -> list[str]:
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    return check_layers.check(tmp_path)


@pytest.mark.parametrize(
    ("where", "code", "says"),
    [
        ("model/a.py", "import torch\ntorch.cuda.synchronize()", "2: device word 'cuda'"),
        ("model/a.py", "x = y.to('cuda:0')", "device word 'cuda'"),
        ("model/a.py", "import torch_npu", "device word 'npu'"),
        ("model/deep/a.py", "def run_on_npu(): pass", "device word 'npu'"),
        ("engine/a.py", "class HipGraph: pass", "device word 'hip'"),
        ("engine/a.py", "f(use_dcu=True)", "device word 'dcu'"),
        ("engine/a.py", "if backend.name == 'Ascend910B': pass", "device word 'ascend'"),
        ("engine/a.py", "x = f'{y} on mps'", "device word 'mps'"),
        ("engine/a.py", "x = t.cpu()", "device word 'cpu'"),
        ("kv/a.py", "def f(xpu): pass", "device word 'xpu'"),
        ("model/a.py", "import os\nos.environ['X']", "2: reads the environment"),
        ("engine/a.py", "from os import getenv", "reads the environment"),
        ("kv/a.py", "import os as o\no.getenv('X')", "2: reads the environment"),
        ("hub/a.py", "import os\nos.environ.get('X')", "2: reads the environment"),
        ("llm.py", "from os import environ as e", "reads the environment"),
        ("model/a.py", "from qwen_rt.backends.reference import ReferenceBackend", "must not import backends.reference"),
        ("model/a.py", "from qwen_rt.backends import select", "must not import backends.select"),
        ("model/a.py", "from ..backends.select import open_backend", "must not import backends.select"),
        ("model/a.py", "from .. import engine", "must not import engine"),
        ("kv/a.py", "import torch", "kv/ must not import torch"),
        ("kv/a.py", "from torch.nn import Module", "kv/ must not import torch.nn"),
        ("model/a.py", "import torch", "model/ must not import torch"),
        ("engine/a.py", "def f():\n    import torch", "2: engine/ must not import torch"),
        ("quant/a.py", "if TYPE_CHECKING:\n    from torch import Tensor", "2: quant/ must not import torch.Tensor"),
        ("checkpoint/deep/a.py", "from torch import nn", "checkpoint/ must not import torch.nn"),
        ("llm.py", "import torch", "1: imports torch with the module"),
        ("plan.py", "import numpy, torch.nn as nn", "imports torch.nn with the module"),
        ("cli/chat.py", "try:\n    from torch import Tensor\nexcept ImportError:\n    pass", "2: imports torch.Tensor"),
        ("tokenizer/a.py", "class A:\n    import torch", "2: imports torch with"),
        ("backends/base.py", "if not TYPE_CHECKING_:\n    import torch", "2: imports torch with"),
        ("backends/base.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", "4: imports torch with"),
        ("backends/cpu/a.py", "import torch", "imports torch with"),
        ("backends/cuda/__init__.py", "import torch", "imports torch with"),
        ("backends/cuda/probe.py", "import torch", "imports torch with"),
        ("backends/dcu/probe.py", "import torch", "imports torch with"),
        ("backends/ascend/probe.py", "import torch", "imports torch with"),
        ("backends/null.py", "import torch", "imports torch with"),
        ("backends/a.py", "import qwen_rt.engine.scheduler", "must not import engine.scheduler"),
        ("backends/x/y.py", "from qwen_rt import model", "must not import model"),
        ("checkpoint/a.py", "from qwen_rt.backends.base import Backend", "must not import backends.base"),
    ],
)
def test_fires(tmp_path: Path, where: str, code: str, says: str) -> None:
    lines = found(tmp_path, where, code)
    assert any(says in line and where in line for line in lines), lines


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("model/a.py", "from qwen_rt.backends.base import Backend\nimport numpy\nx = numpy.device"),
        ("engine/a.py", "from qwen_rt.backends import base\nfrom qwen_rt.model import QwenModel"),
        ("engine/a.py", "ascending = chip = hipster = None  # cuda may be talked about in a comment"),
        ("backends/cuda/backend.py", "import torch\ntorch.cuda.is_available()"),
        ("backends/dcu/backend.py", "import torch"),
        ("backends/gpu/deep/a.py", "from torch import Tensor"),
        ("backends/ascend/a.py", "import torch"),
        ("backends/reference.py", "import torch"),
        ("calibrate.py", "import torch"),
        ("backends/cuda/probe.py", "def probe():\n    import torch"),
        ("llm.py", "async def f():\n    from torch import Tensor"),
        ("llm.py", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("llm.py", "if typing.TYPE_CHECKING:\n    import torch"),
        ("llm.py", "import torchish"),
        ("config.py", "import os\nos.environ"),
        ("kv/a.py", "from .blocks import x\nimport heapq"),
        ("models/a.py", "gpu = 1"),
    ],
)
def test_does_not_fire(tmp_path: Path, where: str, code: str) -> None:
    assert not found(tmp_path, where, code)


def test_the_package_keeps_its_layers() -> None:
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_status_one_on_a_violation(tmp_path: Path) -> None:
    found(tmp_path, "kv/a.py", "import torch")
    assert subprocess.run([sys.executable, str(TOOL), str(tmp_path)], capture_output=True).returncode == 1
