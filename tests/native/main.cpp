// Random cases of every native operation on every instruction set this processor has, for a build with
// AddressSanitizer and UndefinedBehaviorSanitizer. No Python, no framework.
//
//   check [--seed S] [--cases N] [--only OPERATION] [--case I]
//   check --plant read|guard|scratch|overflow|value   a mistake that must be reported: status 0 says that it was not
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "linear.h"
#include "norm.h"
#include "pool.h"
#include "report.h"
#include "silu.h"

namespace check {
namespace {

struct Operation {
  const char* name;
  void (*run)(Case&);
};

constexpr Operation kOperations[] = {
    {"linear", check_linear},       {"embedding", check_embedding}, {"kv", check_kv},
    {"attention", check_attention}, {"rms_norm", check_rms_norm},   {"rope", check_rope},
    {"silu", check_silu},           {"sample", check_sample},       {"gguf", check_gguf},
    {"merges", check_merges},       {"gptq", check_gptq},           {"table", check_table},
};

void print_case() {
  if (running.index < 0) return;
  std::fprintf(stderr, "--- %s: --seed %llu --only %s --case %lld, on %s: %s\n", running.operation,
               static_cast<unsigned long long>(running.seed), running.operation, static_cast<long long>(running.index),
               running.isa, running.text);
}

// Runs one case on a thread of its own, whose scratch is as long as the case needs and no longer; false: it failed.
bool run_case(const Operation& operation, uint64_t seed, int64_t index, double* worst) {
  running.operation = operation.name;
  running.seed = seed;
  running.index = index;
  running.isa = "";
  running.text[0] = '\0';
  uint64_t mixed = seed;
  for (const char* p = operation.name; *p; ++p) mixed = mixed * 0x100000001b3u + static_cast<unsigned char>(*p);
  bool good = true;
  std::thread([&] {
    Case c(Random(mixed + 0x9e3779b97f4a7c15u * static_cast<uint64_t>(index)).next());
    qwen_rt::set_num_threads(static_cast<int>(c.random.pick({1, 1, 2, 4})));
    try {
      operation.run(c);
    } catch (const std::exception& e) {
      good = false;
      std::fprintf(stderr, "%s\n", e.what());
      print_case();
    }
    *worst = std::max(*worst, c.worst);
  }).join();
  return good;
}

int run(uint64_t seed, int64_t cases, const std::string& only, int64_t one) {
  std::string isas;
  for (Isa isa : Case::isas()) isas += std::string(" ") + qwen_rt::isa_name(isa);
  std::printf("seed %llu, %lld cases an operation, on%s\n", static_cast<unsigned long long>(seed),
              static_cast<long long>(one < 0 ? cases : 1), isas.c_str());
  std::fflush(stdout);
  int failures = 0;
  bool known = false;
  for (const Operation& operation : kOperations) {
    if (!only.empty() && only != operation.name) continue;
    known = true;
    double worst = 0.0;
    const auto start = std::chrono::steady_clock::now();
    const int64_t first = one < 0 ? 0 : one, end = one < 0 ? cases : one + 1;
    for (int64_t i = first; i < end && failures < 5; ++i) failures += !run_case(operation, seed, i, &worst);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    std::printf("%-10s at most %.2f of the bound, %.1f s\n", operation.name, worst, took.count());
    std::fflush(stdout);
  }
  if (!known) {
    std::fprintf(stderr, "no operation is called %s\n", only.c_str());
    return 2;
  }
  std::printf("%s\n", failures ? "FAILED" : "passed");
  return failures ? 1 : 0;
}

// --- planted mistakes
// -------------------------------------------------------------------------------------------------

void plant_short_weight(bool guarded) {
  Buffer<float> x(64, false), weight(63, guarded), out(64, false);
  for (int64_t i = 0; i < 64; ++i) x[i] = 1.0f;
  qwen_rt::rms_norm({{x.data(), 64, 64}, {out.data(), 64, 64}, {}, {}, weight.data(), 1e-6f, 1, 1, 64});
}

// Past the end of a vector, within the memory it holds: what kernels keep as scratch.
void plant_scratch() {
  Buffer<float> x(64, false), out(64, false);
  for (int64_t i = 0; i < 64; ++i) x[i] = 1.0f;
  std::vector<float> weight(64);
  weight.pop_back();
  qwen_rt::rms_norm({{x.data(), 64, 64}, {out.data(), 64, 64}, {}, {}, weight.data(), 1e-6f, 1, 1, 64});
}

void plant_overflow() {
  Buffer<float> x(2, false), out(1, false);
  qwen_rt::silu_mul(x.data(), 0, INT64_MAX, 8193, out.data(), 0);  // two tasks a row: their number overflows
}

// The kernel gets a weight with one code changed by one.
void plant_value() {
  running.operation = "plant";
  Case c(1);
  c.use(Case::isas().back());
  qwen_rt::PackedLinear w(qwen_rt::WeightKind::kInt4, qwen_rt::Aux::kNone, 16, 32, 32);
  Buffer<uint8_t> codes(16 * 32, false);
  Buffer<uint16_t> scales(16, false);
  Buffer<float> x(32, false), y(16, false);
  for (int64_t i = 0; i < codes.size(); ++i) codes[i] = 9;
  for (int64_t i = 0; i < 16; ++i) scales[i] = 0x3c00;
  for (int64_t i = 0; i < 32; ++i) x[i] = 1.0f;
  codes[5 * 32 + 7] = 10;
  qwen_rt::pack_grouped(w, 0, 16, codes.data(), scales.data(), nullptr, nullptr);
  qwen_rt::linear(w, x.data(), 32, 1, y.data(), 16);
  const double bound = 32 * std::exp2(0.25) / (2.0 * qwen_rt::kSteps16) + 64 * kEps;  // steps may be rounded up
  for (int64_t n = 0; n < 16; ++n) c.near(y[n], 32.0, bound, "y", 0, n);
}

int plant(const std::string& what) {
  if (what == "read" || what == "guard") {
    plant_short_weight(what == "guard");
  } else if (what == "scratch") {
    plant_scratch();
  } else if (what == "overflow") {
    plant_overflow();
  } else if (what == "value") {
    try {
      plant_value();
    } catch (const Mismatch& e) {
      std::fprintf(stderr, "%s\n", e.what());
      return 1;
    }
  } else {
    std::fprintf(stderr, "--plant: read, guard, scratch, overflow or value\n");
    return 2;
  }
  std::printf("the planted mistake was not found\n");
  return 0;
}

}  // namespace
}  // namespace check

// Called by the sanitizers with a report, so that it names the case.
extern "C" void __asan_on_error() { check::print_case(); }
extern "C" void __ubsan_on_report() { check::print_case(); }

int main(int argc, char** argv) {
  uint64_t seed = std::random_device{}();
  int64_t cases = 100, one = -1;
  std::string only, planted;
  for (int i = 1; i < argc; i += 2) {
    const std::string option = argv[i];
    if (i + 1 == argc) {
      std::fprintf(stderr, "%s needs a value\n", argv[i]);
      return 2;
    }
    const std::string value = argv[i + 1];
    if (option == "--seed") {
      seed = std::stoull(value);
    } else if (option == "--cases") {
      cases = std::stoll(value);
    } else if (option == "--case") {
      one = std::stoll(value);
    } else if (option == "--only") {
      only = value;
    } else if (option == "--plant") {
      planted = value;
    } else {
      std::fprintf(stderr, "no option %s; there are --seed, --cases, --case, --only and --plant\n", argv[i]);
      return 2;
    }
  }
  if (!planted.empty()) return check::plant(planted);
  return check::run(seed, cases, only, one);
}
