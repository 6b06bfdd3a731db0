"""logn attention of Qwen-1: queries past the training length are scaled up, so that attention stays as sharp."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TABLE_END = 32767  # the original's table ends here; later positions keep its last factor


def logn_scale(positions: Sequence[int], train_length: int) -> NDArray[np.float32]:
    """Positions [T] -> float32 [T]: log base train_length of (p + 1), at least 1.

    The original applies it when the keys outnumber train_length; a query sees its own key last, so p decides alone.
    """
    keys = np.minimum(np.asarray(positions, np.float64) + 1, TABLE_END)
    return np.maximum(np.log(keys) / math.log(train_length), 1.0).astype(np.float32)
