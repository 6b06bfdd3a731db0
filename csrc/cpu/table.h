// A table that is only looked up in, left in its file: rows are read when they are wanted, and the system keeps those
// that are wanted often. Values are those that packing gives (linear.h): exact, but for one rounding where a type has
// minimums.
#pragma once

#include <cstdint>
#include <string>

#include "gguf.h"
#include "linear.h"

namespace qwen_rt {

class Table {
 public:
  // n rows of k elements from `offset` on; kind is float32, float16, bfloat16 or a quantised GGUF type, of whose blocks
  // k is a multiple. std::invalid_argument for another kind, std::runtime_error when the file cannot be opened.
  Table(const std::string& path, int64_t offset, int64_t n, int64_t k, const std::string& kind);
  ~Table();
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;

  // Whether all values are finite; reads everything once. std::runtime_error as rows().
  bool finite() const;
  // out [count, k] = rows ids[i], each in [0, n). std::runtime_error when the file ends before them.
  void rows(const int64_t* ids, int64_t count, float* out) const;

  const int64_t n, k;

 private:
  bool read(int64_t row, int64_t count, uint8_t* out) const;
  void widen(const uint8_t* row, float* out) const;
  [[noreturn]] void fail() const;

  const std::string path_;
  const int64_t offset_;
  const GgufType* type_;  // null: dense, of kind_
  WeightKind kind_;
  int64_t row_bytes_;
  int file_;
};

}  // namespace qwen_rt
