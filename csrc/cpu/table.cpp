#include "table.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "file.h"
#include "half.h"
#include "memory.h"
#include "pool.h"

namespace qwen_rt {
namespace {

GgufDecoded& decoded() {
  static thread_local GgufDecoded row;
  return row;
}

}  // namespace

Table::Table(const std::string& path, int64_t offset, int64_t rows, int64_t columns, const std::string& kind)
    : n(rows), k(columns), path_(path), offset_(offset), type_(gguf_type(kind.c_str())), kind_(WeightKind::kInt4) {
  const bool known = type_ ? k % type_->block == 0 : weight_kind(kind, &kind_) && kind_ >= WeightKind::kFloat32;
  if (!known || n < 1 || k < 1 || offset < 0) throw std::invalid_argument("table: no such kind or shape: " + kind);
  row_bytes_ = type_ ? k / type_->block * type_->bytes : k * element_bytes(kind_);
  file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file_ < 0) throw std::runtime_error(path + ": cannot be opened: " + std::strerror(errno));
}

Table::~Table() { close(file_); }

bool Table::read(int64_t row, int64_t count, uint8_t* out) const {
  return read_at(file_, offset_ + row * row_bytes_, count * row_bytes_, out);
}

void Table::fail() const {
  throw std::runtime_error(path_ + ": rows of the embedding table cannot be read; the file changed while the model is in "
                                   "use: load the model again");
}

bool Table::finite() const {
  const int64_t step = std::max<int64_t>(1, (int64_t{1} << 18) / row_bytes_);
  std::atomic<bool> good{true}, there{true};
  parallel_for((n + step - 1) / step, [&](int64_t task) {
    static thread_local Scratch<uint8_t> scratch;
    const int64_t row = task * step, count = std::min(step, n - row);
    uint8_t* data = scratch.room(count * row_bytes_);
    if (!good.load(std::memory_order_relaxed) || !there.load(std::memory_order_relaxed)) return;
    if (!read(row, count, data)) return there.store(false);
    bool fine = true;
    if (!type_) {
      fine = kind_ == WeightKind::kFloat32
                 ? all_finite(reinterpret_cast<const uint32_t*>(data), count * k, uint32_t{0x7f800000})
                 : all_finite(reinterpret_cast<const uint16_t*>(data), count * k,
                              static_cast<uint16_t>(kind_ == WeightKind::kFloat16 ? 0x7c00 : 0x7f80));
    }
    for (int64_t r = 0; type_ && r < count; ++r) {
      fine = fine && decoded().decode(*type_, data + r * row_bytes_, k / type_->block);
    }
    if (!fine) good.store(false);
  });
  if (!there.load()) fail();
  return good.load();
}

void Table::widen(const uint8_t* row, float* out) const {
  if (!type_) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(row);
    if (kind_ == WeightKind::kFloat32) {
      std::memcpy(out, row, k * sizeof(float));
    } else if (kind_ == WeightKind::kFloat16) {
      std::transform(halves, halves + k, out, f16_to_float);
    } else {
      std::transform(halves, halves + k, out, bf16_to_float);
    }
    return;
  }
  GgufDecoded& d = decoded();
  d.decode(*type_, row, k / type_->block);
  const int zero = type_->has_mins ? 0 : implied_zero(type_->kind);
  for (int64_t g = 0; g < k / type_->group; ++g) {
    const float scale = f16_to_float(d.scales[g]), min = type_->has_mins ? f16_to_float(d.mins[g]) : 0.0f;
    for (int64_t i = g * type_->group; i < (g + 1) * type_->group; ++i) {
      out[i] = scale * static_cast<float>(d.codes[i] - zero) + min;
    }
  }
}

void Table::rows(const int64_t* ids, int64_t count, float* out) const {
  constexpr int64_t kTask = 16;
  std::atomic<bool> there{true};
  parallel_for((count + kTask - 1) / kTask, [&](int64_t task) {
    static thread_local Scratch<uint8_t> scratch;
    uint8_t* row = scratch.room(row_bytes_);
    for (int64_t i = task * kTask; i < std::min(count, (task + 1) * kTask); ++i) {
      if (!read(ids[i], 1, row)) return there.store(false);
      widen(row, out + i * k);
    }
  });
  if (!there.load()) fail();
}

}  // namespace qwen_rt
