"""Resident memory while loading: what the caller keeps, and little else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import HF_CONFIGS, write_config
from test_checkpoint_gptq import quantised

from qwen_rt.checkpoint.layout import expected_shapes
from qwen_rt.checkpoint.save import Item, save_weights
from qwen_rt.config import ModelConfig
from qwen_rt.dtypes import host_dtype

READ = """
import json, sys
from qwen_rt.checkpoint import open_checkpoint

def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) >> 10 for line in file if line.startswith(field))

import ml_dtypes
from qwen_rt.native import extension

extension()
before = resident("VmRSS")
checkpoint = open_checkpoint(sys.argv[1])
for name, (n, k) in checkpoint.linears().items():
    raw = checkpoint.linear(name)
    for start in range(0, n, 256):
        raw.rows(start, min(start + 256, n))
print(json.dumps([checkpoint.nbytes() >> 20, resident("VmHWM") - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin", "gptq"])
def test_peak_while_reading_by_rows(tmp_path: Path, kind: str) -> None:
    wide = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 8192}
    config = HF_CONFIGS["qwen2"] | wide | {"num_hidden_layers": 2, "vocab_size": 50000}
    shapes = expected_shapes(ModelConfig.from_hf(config))
    if kind == "gptq":
        config = quantised(config | {"num_hidden_layers": 8, "vocab_size": 64}, group_size=128)
        shapes = {}
        for name, shape in expected_shapes(ModelConfig.from_hf(config)).items():
            if len(shape) == 1 or "embed" in name:
                shapes[name] = shape
            else:
                (n, k), stem = shape, name.removesuffix(".weight")
                shapes |= {f"{stem}.qweight": (k // 8, n), f"{stem}.qzeros": (k // 128, n // 8)}
                shapes[f"{stem}.scales"] = (k // 128, n)
    write_config(tmp_path, config)
    dtypes = {n: "int32" if n.endswith(("qweight", "qzeros")) else "bfloat16" for n in shapes}
    if kind == "bin":
        state = {n: torch.zeros(s, dtype=getattr(torch, dtypes[n])) for n, s in shapes.items()}
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        made = [
            Item(((n, dtypes[n], s),), lambda n=n, s=s: iter([np.zeros(s, host_dtype(dtypes[n]))]))  # type: ignore[misc]
            for n, s in shapes.items()
        ]
        save_weights(tmp_path, made)
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=True)
    size, peak = json.loads(done.stdout)
    assert size > 100
    assert peak < 48  # MiB: one packed linear of 4 MiB, or 256 rows; allocator slack is the rest
