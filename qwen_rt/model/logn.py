"""logn attention of Qwen-1: queries past the training length are scaled up, so that attention stays as sharp."""

from __future__ import annotations

import math

from torch import Tensor

TABLE_END = 32767  # the original's table ends here; later positions keep its last factor


def logn_scale(positions: Tensor, train_length: int) -> Tensor:
    """Positions int64 [T] -> float32 [T]: log base train_length of (p + 1), at least 1.

    The original applies it when the keys outnumber train_length; a query sees its own key last, so p decides alone.
    """
    keys = (positions.double() + 1).clamp_(max=TABLE_END)
    return (keys.log() / math.log(train_length)).clamp_(min=1.0).float()
