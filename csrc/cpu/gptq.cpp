#include "gptq.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "half.h"
#include "pool.h"

namespace qwen_rt {
namespace {

// A word of the file holds the inputs that a word of the panel holds, in another order (linear.h).
template <WeightKind kKind>
uint32_t reordered(uint32_t word) {
  if constexpr (kKind == WeightKind::kInt8) {
    return ((word & 0xff0000ff) | (word << 8 & 0xff0000) | (word >> 8 & 0xff00)) ^ 0x80808080;
  } else {
    const auto every_second = [](uint32_t nibbles) {  // of eight nibbles the even ones, side by side
      const uint32_t bytes = (nibbles & 0x000f000f) | (nibbles >> 4 & 0x00f000f0);
      return (bytes & 0xff) | (bytes >> 8 & 0xff00);
    };
    return every_second(word) | every_second(word >> 4) << 16;
  }
}

template <WeightKind kKind>
void pack_panel_words(const GptqWords& words, int64_t column, int count, int64_t vectors, int64_t at, uint8_t* out) {
  for (int64_t v = 0; v < vectors; ++v, out += 64) {
    uint32_t packed[kPanel];
    const uint32_t* in = words.codes + (at + v) * words.codes_stride + column;
    if (count == kPanel) {
      for (int c = 0; c < kPanel; ++c) packed[c] = reordered<kKind>(in[c]);
    } else {
      for (int c = 0; c < kPanel; ++c) packed[c] = c < count ? reordered<kKind>(in[c]) : 0;
    }
    std::memcpy(out, packed, 64);
  }
}

// The scales and zero points of a group; false when one is not finite.
bool pack_header(const GptqWords& words, int64_t column, int count, int64_t group, uint8_t* out) {
  uint16_t head[2 * kPanel] = {};
  const uint16_t* scales = words.scales + words.source[group] * words.scales_stride + column;
  std::copy(scales, scales + count, head);
  if (words.zeros) {
    const uint8_t* zeros = words.zeros + words.source[group] * words.zeros_stride + column;
    for (int c = 0; c < count; ++c) head[kPanel + c] = float_to_f16(static_cast<float>(zeros[c]));
  }
  std::memcpy(out, head, words.zeros ? sizeof(head) : sizeof(head) / 2);
  return all_finite<uint16_t>(head, kPanel, 0x7c00);
}

}  // namespace

bool gptq_fits(const PackedLinear& w, bool zeros) {
  return (w.kind == WeightKind::kInt4 || w.kind == WeightKind::kInt8) && w.k == w.padded_k &&
         w.aux == (zeros ? Aux::kZeros : Aux::kNone);
}

bool gptq_pack(PackedLinear& w, int64_t start, int64_t count, const GptqWords& words) {
  constexpr int64_t kTask = 8;  // panels: a row of words is read 512 bytes at a time
  const int64_t vectors = w.group / layout_of(w.kind).ks, panels = (count + kPanel - 1) / kPanel;
  const auto pack = w.kind == WeightKind::kInt4 ? pack_panel_words<WeightKind::kInt4> : pack_panel_words<WeightKind::kInt8>;
  std::atomic<bool> finite{true};
  parallel_for((panels + kTask - 1) / kTask, [&](int64_t task) {
    const int64_t end = std::min(panels, (task + 1) * kTask);
    for (int64_t g = 0; g < w.groups(); ++g) {
      for (int64_t p = task * kTask; p < end; ++p) {
        const int64_t column = p * kPanel;
        const int live = static_cast<int>(std::min<int64_t>(kPanel, count - column));
        uint8_t* out = w.panel(start / kPanel + p) + g * w.group_bytes;
        if (!pack_header(words, column, live, g, out)) finite.store(false, std::memory_order_relaxed);
        pack(words, column, live, vectors, g * vectors, out + header_bytes(w.aux));
      }
    }
  });
  return finite.load();
}

}  // namespace qwen_rt
