// SPDX-License-Identifier: Apache-2.0
#include "wgmma.h"

#include <algorithm>
#include <cstring>

#include "asynchronous.h"

namespace fomoe::emulation {

namespace {

constexpr uint32_t kPoison = 0x7fc0dead;  // a NaN
constexpr int kDepth = 16;

bool equal(const float* a, const std::vector<float>& b) {
  return std::memcmp(a, b.data(), b.size() * sizeof(float)) == 0;
}

bool is_poison(const float* values, size_t count) {
  return std::all_of(values, values + count,
                     [](float x) { return std::bit_cast<uint32_t>(x) == kPoison; });
}

/// An operand in shared memory, as its descriptor says.
struct Operand {
  uint32_t start, leading, stride;
  bool is_mn_major;

  Operand(uint64_t descriptor, bool mn_major)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        is_mn_major(mn_major) {
    if (descriptor >> 62 != 1) fail("a wgmma descriptor without 128-byte swizzle");
  }

  /// Offset of the 16 bytes that hold element (mn, k).
  uint32_t offset(int mn, int k) const {
    return is_mn_major ? start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2
                       : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
  }
  /// Calls function(first mn, first k, offset of 8 consecutive elements) for the whole operand.
  template <typename Function>
  void for_each_piece(int extent, const Function& function) const {
    for (int mn = 0; mn < extent; mn += is_mn_major ? 8 : 1) {
      for (int k = 0; k < kDepth; k += is_mn_major ? 1 : 8) {
        function(mn, k, swizzled(offset(mn, k)));
      }
    }
  }
};

void mark(const WgmmaInstruction& i, bool begins) {
  SharedState& shared = asynchronous().shared;
  const auto mark_piece = [&](int, int, uint32_t offset) {
    const char* address = block().shared + offset;
    if (begins) {
      shared.begin_read(SharedState::Reader::kWgmma, address, 16);
    } else {
      shared.end_read(SharedState::Reader::kWgmma, address, 16);
    }
  };
  Operand(i.a, i.shape.a_is_mn_major).for_each_piece(64, mark_piece);
  Operand(i.b, i.shape.b_is_mn_major).for_each_piece(i.shape.n, mark_piece);
}

/// The operand as [k][mn].
std::vector<float> read(const Operand& operand, int extent, float (*to_float)(uint16_t)) {
  std::vector<float> values(static_cast<size_t>(extent) * kDepth);
  operand.for_each_piece(extent, [&](int mn, int k, uint32_t offset) {
    uint16_t elements[8];
    std::memcpy(elements, block().shared + offset, sizeof(elements));
    for (int e = 0; e < 8; ++e) {
      const int at_mn = operand.is_mn_major ? mn + e : mn, at_k = operand.is_mn_major ? k : k + e;
      values[at_k * extent + at_mn] = to_float(elements[e]);
    }
  });
  return values;
}

/// sums [64][n] += a^T b.
__attribute__((no_sanitize("address", "undefined"), optimize("O3"))) void multiply(
    const float* a, const float* b, int n, float* __restrict sums) {
  for (int m = 0; m < 64; ++m) {
    for (int k = 0; k < kDepth; ++k) {
      const float factor = a[k * 64 + m];
      const float* row = b + k * n;
      float* to = sums + m * n;
      for (int j = 0; j < n; ++j) to[j] += factor * row[j];
    }
  }
}

/// Calls function(sum in the matrix [64][n], element of the thread's accumulator).
template <typename Function>
void for_each_element(int thread, int n, const Function& function) {
  const int row = thread / 32 * 16 + thread % 32 / 4, col = thread % 4 * 2;
  for (int j = 0; j < n / 8; ++j) {
    for (int i = 0; i < 4; ++i) function((row + i / 2 * 8) * n + 8 * j + col + i % 2, 4 * j + i);
  }
}

void execute(int warpgroup, WgmmaInstruction& i) {
  const int n = i.shape.n;
  std::vector<float> sums(static_cast<size_t>(64) * n);
  ThreadState* threads = &asynchronous().threads[warpgroup * 128];
  for (int t = 0; i.accumulate && t < 128; ++t) {
    const auto& values = threads[t].accumulators.at(i.accumulators[t]).values;
    for_each_element(t, n, [&](int sum, int element) { sums[sum] = values[element]; });
  }
  const auto a = read(Operand(i.a, i.shape.a_is_mn_major), 64, i.shape.to_float);
  const auto b = read(Operand(i.b, i.shape.b_is_mn_major), n, i.shape.to_float);
  multiply(a.data(), b.data(), n, sums.data());
  mark(i, false);
  for (int t = 0; t < 128; ++t) {
    float* registers = i.accumulators[t];
    Accumulator& accumulator = threads[t].accumulators.at(registers);
    auto& values = accumulator.values;
    for_each_element(t, n, [&](int sum, int element) { values[element] = sums[sum]; });
    if (--accumulator.instructions > 0) continue;
    if (!is_poison(registers, values.size())) {
      fail("an accumulator is written before the wgmma that writes it is waited for");
    }
    std::copy(values.begin(), values.end(), registers);
  }
}

Warpgroup& own_warpgroup() { return asynchronous().warpgroups[fiber().thread / 128]; }

}  // namespace

void wgmma_fence(float* accumulator, int count) {
  Accumulator& state = thread_state().accumulators[accumulator];
  if (state.instructions == 0) state.values.assign(accumulator, accumulator + count);
}

void wgmma(float* accumulator, uint64_t a, uint64_t b, const WgmmaShape& shape, bool accumulate) {
  ThreadState& thread = thread_state();
  const size_t count = shape.n / 2;
  Accumulator& state = thread.accumulators[accumulator];
  if (state.instructions == 0) {
    if (state.values.size() != count || !equal(accumulator, state.values)) {
      fail("an accumulator is written without wgmma.fence before the next wgmma");
    }
    std::fill_n(accumulator, count, std::bit_cast<float>(kPoison));
  } else if (!is_poison(accumulator, count)) {
    fail("an accumulator is written before the wgmma that writes it is waited for");
  }
  ++state.instructions;

  Warpgroup& warpgroup = own_warpgroup();
  const auto place = static_cast<size_t>(thread.wgmma_issued++ - warpgroup.first);
  if (place == warpgroup.instructions.size()) {
    warpgroup.instructions.push_back({a, b, shape, accumulate});
    mark(warpgroup.instructions.back(), true);
  }
  WgmmaInstruction& instruction = warpgroup.instructions[place];
  if (instruction.a != a || instruction.b != b || instruction.shape != shape ||
      instruction.accumulate != accumulate) {
    fail("the threads of a warpgroup disagree about a wgmma");
  }
  instruction.accumulators[fiber().thread % 128] = accumulator;
  ++instruction.issued;
}

void wgmma_commit() {
  ThreadState& thread = thread_state();
  thread.wgmma_groups.push_back(thread.wgmma_issued);
}

void wgmma_wait(int groups_in_flight) {
  // Gives the others time to do harm, and its warpgroup time to come.
  for (int turn = 0; turn < 2; ++turn) {
    ++block().progress;
    wait_as(FiberState::kPolling);
  }
  auto& groups = thread_state().wgmma_groups;
  Warpgroup& warpgroup = own_warpgroup();
  while (static_cast<int>(groups.size()) > groups_in_flight) {
    while (warpgroup.first < groups.front()) {
      if (warpgroup.instructions.front().issued < 128) {
        wait_as(FiberState::kPolling);
        continue;
      }
      execute(fiber().thread / 128, warpgroup.instructions.front());
      warpgroup.instructions.pop_front();
      ++warpgroup.first;
      ++block().progress;
    }
    groups.pop_front();
  }
}

}  // namespace fomoe::emulation
