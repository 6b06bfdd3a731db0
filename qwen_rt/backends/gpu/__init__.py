"""What the CUDA and DCU backends share: driver, toolchain and kernels of csrc/gpu. Importing it touches no device."""
