#include "check.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <new>

#include "report.h"

namespace check {

uint64_t Random::next() {
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

float Random::normal() {
  const double u = 1.0 - uniform(), v = uniform();  // u > 0
  return static_cast<float>(std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v));
}

Memory::Memory(size_t bytes, bool guarded) {
  if (!guarded) {
    data_ = std::malloc(bytes);
    if (!data_) throw std::bad_alloc();
    return;
  }
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), inside = (bytes + page - 1) / page * page;
  mapped_ = inside + page;
  map_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map_ == MAP_FAILED) throw std::bad_alloc();
  char* const end = static_cast<char*>(map_) + inside;
  if (mprotect(end, page, PROT_NONE) != 0) throw std::bad_alloc();
  data_ = end - bytes;
}

Memory::~Memory() {
  if (map_) {
    munmap(map_, mapped_);
  } else {
    std::free(data_);
  }
}

void Case::describe(const char* format, ...) {
  std::va_list args;
  va_start(args, format);
  std::vsnprintf(running.text, sizeof(running.text), format, args);
  va_end(args);
}

std::vector<Isa> Case::isas() {
  std::vector<Isa> out;
  for (Isa isa : qwen_rt::kIsas) {
    if (qwen_rt::has_isa(isa)) out.push_back(isa);
  }
  return out;
}

void Case::use(Isa isa) {
  running.isa = qwen_rt::isa_name(isa);
  if (!qwen_rt::set_active_isa(isa)) throw Mismatch("the instruction set is not there");
}

void Case::expect(bool condition, const char* what, int64_t i, int64_t j) const {
  if (condition) return;
  throw Mismatch(std::string(what) + " at " + std::to_string(i) + ", " + std::to_string(j));
}

void Case::near(double got, double want, double bound, const char* what, int64_t i, int64_t j) {
  const double error = std::fabs(got - want);
  if (!(error <= bound)) {
    char text[256];
    std::snprintf(text, sizeof(text), "%s at %lld, %lld: %.9g, not %.9g +- %.3g", what, static_cast<long long>(i),
                  static_cast<long long>(j), got, want, bound);
    throw Mismatch(text);
  }
  if (error > 0.0 && error > worst * bound) worst = error / bound;
}

double f16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                           : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                          : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

double bf16_value(uint16_t bits) {
  const int exponent = bits >> 7 & 255, mantissa = bits & 0x7f;
  const double magnitude = exponent == 255 ? (mantissa ? NAN : INFINITY)
                           : exponent      ? std::ldexp(128 + mantissa, exponent - 134)
                                           : std::ldexp(mantissa, -133);
  return bits & 0x8000 ? -magnitude : magnitude;
}

namespace {

// Nearest double with `digits` bits and no exponent below `lowest` (of the last bit); infinite from 2^top.
double nearest(double x, int digits, int lowest, int top) {
  if (x == 0.0 || !std::isfinite(x)) return x;
  const int last = std::max(std::ilogb(x) - digits + 1, lowest);
  const double y = std::ldexp(std::nearbyint(std::ldexp(x, -last)), last);
  return std::fabs(y) >= std::ldexp(1.0, top) ? std::copysign(INFINITY, x) : y;
}

}  // namespace

double f16_nearest(double x) { return nearest(x, 11, -24, 16); }
double bf16_nearest(double x) { return nearest(x, 8, -133, 128); }

}  // namespace check
