// What the checks of the native kernels share: random numbers, memory with nothing behind it, and comparison within a
// bound. A check draws one case from its Random, runs it on every instruction set and compares with loops in double.
#pragma once

#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu_features.h"

namespace check {

using qwen_rt::Isa;

constexpr double kEps = 0x1p-24;  // half a unit in the last place of a float32 of 1

// splitmix64: any seed will do, and a case is found again from its own.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next();
  int64_t between(int64_t low, int64_t high) {  // both included
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  bool chance(double p) { return uniform() < p; }
  float normal();
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<int64_t>(choices.size()) - 1)];
  }

 private:
  uint64_t state_;
};

// `bytes` bytes that end right where the sanitizer's red zone begins, or with `guarded` a page that cannot be touched:
// masked loads and assembly are not instrumented, but no instruction reads that page.
class Memory {
 public:
  Memory(size_t bytes, bool guarded);
  ~Memory();
  Memory(Memory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), map_(std::exchange(other.map_, nullptr)), mapped_(other.mapped_) {}
  Memory& operator=(Memory&&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  void* map_ = nullptr;  // null: from the heap
  size_t mapped_ = 0;
};

// n elements and not a byte more; filled with the byte 0xff, which makes floats of any width NaN.
template <class T>
class Buffer {
 public:
  Buffer(Random& random, int64_t n) : Buffer(n, random.chance(0.3)) {}
  Buffer(int64_t n, bool guarded) : memory_(static_cast<size_t>(n) * sizeof(T), guarded), size_(n) {
    std::memset(memory_.data(), kUntouched, static_cast<size_t>(n) * sizeof(T));
  }
  T* data() const { return static_cast<T*>(memory_.data()); }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return size_; }
  bool untouched(int64_t i) const {
    const auto* p = reinterpret_cast<const unsigned char*>(data() + i);
    for (size_t b = 0; b < sizeof(T); ++b) {
      if (p[b] != kUntouched) return false;
    }
    return true;
  }

 private:
  static constexpr unsigned char kUntouched = 0xff;
  Memory memory_;
  int64_t size_;
};

// A file that is there as long as this is.
struct File {
  std::string path = "/tmp/qwen-rt-check-XXXXXX";
  int fd = mkstemp(path.data());
  ~File() {
    close(fd);
    unlink(path.c_str());
  }
  // Whether it has these bytes now, and no others.
  bool write(const std::vector<uint8_t>& bytes) const {
    return ftruncate(fd, 0) == 0 && pwrite(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size());
  }
};

// Thrown where a result is wrong.
struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One case: its random numbers, what it is (for the report of a failure, the sanitizer's too), and how close it came.
struct Case {
  explicit Case(uint64_t seed) : random(seed) {}
  Random random;
  double worst = 0.0;  // largest share of a bound that an error took

  void describe(const char* format, ...) __attribute__((format(printf, 2, 3)));
  // The instruction sets this processor has, lowest first; use() makes one the active one.
  static std::vector<Isa> isas();
  void use(Isa isa);
  void expect(bool condition, const char* what, int64_t i = 0, int64_t j = 0) const;
  // |got - want| <= bound; NaN is never near anything.
  void near(double got, double want, double bound, const char* what, int64_t i = 0, int64_t j = 0);
};

// --- 16-bit floats, by arithmetic on doubles
// --------------------------------------------------------------------------
double f16_value(uint16_t bits);
double bf16_value(uint16_t bits);
// Nearest float16 or bfloat16 to x, ties to even, as a double; x beyond the format is infinite.
double f16_nearest(double x);
double bf16_nearest(double x);

// --- the checks
// -------------------------------------------------------------------------------------------------------
void check_linear(Case& c);
void check_embedding(Case& c);
void check_kv(Case& c);
void check_attention(Case& c);
void check_rms_norm(Case& c);
void check_rope(Case& c);
void check_silu(Case& c);
void check_sample(Case& c);
void check_gguf(Case& c);
void check_gptq(Case& c);
void check_table(Case& c);
void check_merges(Case& c);

}  // namespace check
