"""NVIDIA GPUs: `probe` looks for them without torch, `backend` runs them through it and the kernels of csrc/gpu."""
