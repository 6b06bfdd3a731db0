// Reading at a place of an open file.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <cstdint>

namespace qwen_rt {

// Fills out with `bytes` bytes from `offset` on. False: they cannot be read, or the file ends before.
inline bool read_at(int file, int64_t offset, int64_t bytes, uint8_t* out) {
  while (bytes > 0) {
    const ssize_t got = pread(file, out, static_cast<size_t>(bytes), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    out += got;
    offset += got;
    bytes -= got;
  }
  return true;
}

}  // namespace qwen_rt
