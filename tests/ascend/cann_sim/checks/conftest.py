"""These run in the environment of npu_env.py with the software NPU loaded: test_cann_sim.py starts them."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("QWEN_RT_INSIDE_NPU") else ["*"]
