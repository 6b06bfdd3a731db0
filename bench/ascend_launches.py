"""Count the operators that a decode step launches on an Ascend 910B, on the software NPU (tests/ascend/cann_sim).

    python bench/ascend_launches.py

A step of a model with two layers and one with three, traced: the difference is a layer's, the rest is the step's own.
The first run makes the environment with torch_npu and builds the software NPU (minutes).
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORMATS = {"bf16": "None", "Int4": "QuantConfig('gptq', 4, 128, symmetric=True, act_order=False)"}
STEP = """
import sys
from dataclasses import replace
sys.path.insert(0, "tests/ascend/inside")
import decoding
from qwen_rt.config import QuantConfig
backend = decoding.opened("bfloat16", 0)
config = replace(decoding.QWEN2, num_layers={layers})
model = decoding.build(decoding.RandomCheckpoint(config, {quant}), backend)
for tokens in (2, 3):
    print("MARK", file=sys.stderr, flush=True)
    decoding.decode(model, "bfloat16", [tokens], prompts=[[1, 2, 3]])
print("MARK", file=sys.stderr, flush=True)
"""


def launches(layers: int, quant: str) -> Counter[str]:
    """How often each task of a decode step runs: of an answer of 3 tokens, what one of 2 has not."""
    sys.path.insert(0, str(ROOT / "tests" / "ascend"))
    import npu_env

    done = npu_env.run("-c", STEP.format(layers=layers, quant=quant), CANNSIM_TRACE="1")
    _, two, three, _ = (Counter(re.findall(r"stream \d+ runs (\w+)", p)) for p in done.stderr.split("MARK\n"))
    return three - two


def main() -> None:
    """Print the counts by format."""
    for name, quant in FORMATS.items():
        two, three = launches(2, quant), launches(3, quant)
        layer = three - two
        print(f"{name}: {layer.total()} a layer, {two.total() - 2 * layer.total()} beside")
        print("  a layer:", ", ".join(f"{n} {op.removeprefix('aclnn')}" for op, n in sorted(layer.items())))


if __name__ == "__main__":
    main()
