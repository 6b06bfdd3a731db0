"""What lies in inside/ runs in the environment of npu_env.py, which test_ascend.py starts: not collected here."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("QWEN_RT_INSIDE_NPU") else ["inside/*"]
