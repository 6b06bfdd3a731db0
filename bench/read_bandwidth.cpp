// Read bandwidth of memory: every byte of a buffer much larger than the last cache is loaded once, by 1 .. n threads that
// each read a contiguous part. Several access patterns, because no single one is the fastest on every processor; the
// caller takes the fastest. Built by bench/roofline.py.
#include <sys/mman.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

typedef uint64_t Vec __attribute__((vector_size(64), aligned(64)));  // one cache line; the compiler splits it where it must

// Reads lines [0, lines) of `base` as kStreams runs side by side; kAhead lines ahead are prefetched (0: none).
template <int kStreams, int kAhead>
uint64_t read_lines(const Vec* base, size_t lines) {
    constexpr int kUnroll = 8 / kStreams;
    const size_t run = lines / kStreams;
    Vec sum[kStreams * kUnroll] = {};
    for (size_t i = 0; i + kUnroll <= run; i += kUnroll) {
        for (int s = 0; s < kStreams; ++s) {
            const Vec* p = base + s * run + i;
            for (int u = 0; u < kUnroll; ++u) {
                if (kAhead) __builtin_prefetch(p + u + kAhead);
                sum[s * kUnroll + u] ^= p[u];  // xor: nothing to wait for but the load
            }
        }
    }
    uint64_t out = 0;
    for (const Vec& v : sum)
        for (int j = 0; j < 8; ++j) out ^= v[j];
    return out;
}

using Reader = uint64_t (*)(const Vec*, size_t);
constexpr Reader kReaders[] = {read_lines<1, 0>, read_lines<1, 16>, read_lines<1, 64>, read_lines<4, 0>, read_lines<4, 16>};

}  // namespace

extern "C" {

// A buffer of `bytes` (a multiple of 2 MiB), every page written so that it has memory of its own; null without memory.
void* make_buffer(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    madvise(p, bytes, MADV_HUGEPAGE);  // page walks are not what is to be measured; refused: small pages
    std::memset(p, 0x5a, bytes);
    return p;
}

void free_buffer(void* p, size_t bytes) { munmap(p, bytes); }

int num_patterns() { return static_cast<int>(sizeof(kReaders) / sizeof(kReaders[0])); }

// Seconds in which `threads` threads read the buffer once in one pattern; `*check` takes what the loads must not lose.
double read_seconds(const void* buffer, size_t bytes, int threads, int pattern, uint64_t* check) {
    const size_t lines = bytes / sizeof(Vec) / threads;
    std::vector<uint64_t> found(threads);
    std::vector<std::thread> others;
    auto part = [&](int t) { found[t] = kReaders[pattern](static_cast<const Vec*>(buffer) + t * lines, lines); };
    const auto start = std::chrono::steady_clock::now();
    for (int t = 1; t < threads; ++t) others.emplace_back(part, t);
    part(0);
    for (std::thread& other : others) other.join();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    for (uint64_t f : found) *check ^= f;
    return taken.count();
}
}
