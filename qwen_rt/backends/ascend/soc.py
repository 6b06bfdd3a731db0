"""What the Ascend 910 generations can do, by the name the driver reports.

The fused operators used here are documented for the Atlas A2 and A3 series (Ascend910B1 .. B4, Ascend910_93xx) and,
operator by operator, as absent on the first generation (Ascend910A, Ascend910B without a digit, Ascend910ProA ...),
whose cube has no bfloat16 either. What is unknown is treated as the first generation: plain operators run everywhere.
Source: the product tables at the head of each operator's page (CANN operator library; op-plugin's docs/context).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SECOND = re.compile(r"Ascend910(B\d|_93)")
_FIRST = re.compile(r"Ascend910(A|B|Pro[AB]|PremiumA)?$")


@dataclass(frozen=True)
class Soc:
    """A system on chip."""

    name: str
    fused: bool  # attention, cache writes, norms, rotation, SwiGLU and quantised products as single operators
    bfloat16: bool
    graphs: bool  # NPUGraph
    known: bool = True

    @property
    def generation(self) -> str:
        """How people call it."""
        return "910B or newer" if self.fused else "910A" if self.known else "unknown to qwen_rt"


def soc_of(name: str) -> Soc:
    """Soc of a reported name, e.g. "Ascend910B3"."""
    second = bool(_SECOND.match(name))
    return Soc(name, second, second, second, second or bool(_FIRST.match(name)))
