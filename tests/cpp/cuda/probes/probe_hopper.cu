// SPDX-License-Identifier: Apache-2.0
// Asks a Hopper GPU whether it does what the emulation assumes: one JSON line per probe,
//
//   {"probe": name, "expected": what, "got": what, "ok": true|false, "required": true|false}
//
// Exit status 1 when a required one is not ok: no kernel relies on the others. Emulated, it shows
// that the probes themselves are right about what they expect.
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "cuda/on_device.h"
#include "fomoe/kernel_path.h"
#include "probe_kernels.cuh"

namespace {

using namespace probes;
using fomoe::DType;
using fomoe::cuda::launch;
using fomoe::cuda::make_tensor_map;

constexpr int64_t kInfinite = int64_t{1} << 30;  // rows of a ragged map

bool all_required_are_ok = true;

void report(const std::string& probe, const std::string& expected, const std::string& got,
            bool required) {
  const bool ok = expected == got;
  all_required_are_ok = all_required_are_ok && (ok || !required);
  std::printf(
      "{\"probe\": \"%s\", \"expected\": \"%s\", \"got\": \"%s\", \"ok\": %s, "
      "\"required\": %s}\n",
      probe.c_str(), expected.c_str(), got.c_str(), ok ? "true" : "false",
      required ? "true" : "false");
  std::fflush(stdout);
}

/// Small integers, so that every sum is exact.
std::vector<double> integers(int64_t count, int modulus) {
  std::vector<double> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<double>(static_cast<int>(i * 2654435761u >> 7) % modulus - modulus / 2);
  }
  return values;
}

std::string difference(const std::vector<double>& found, const std::vector<double>& expected,
                       int status) {
  if (status != 0) return "the barrier never completed";
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (found[i] == expected[i]) continue;
    if (wrong++ == 0) first = i;
  }
  if (wrong == 0) return "equal";
  return std::to_string(wrong) + " of " + std::to_string(expected.size()) +
         " elements differ, first at " + std::to_string(first) + ": " +
         std::to_string(found[first]) + " for " + std::to_string(expected[first]);
}

/// a [64][depth] times b [n][depth] transposed.
std::vector<double> product(const std::vector<double>& a, const std::vector<double>& b, int n,
                            int depth) {
  std::vector<double> out(static_cast<size_t>(kRows) * n);
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < n; ++j) {
      for (int k = 0; k < depth; ++k) out[m * n + j] += a[m * depth + k] * b[j * depth + k];
    }
  }
  return out;
}

std::vector<double> transposed(const std::vector<double>& values, int rows, int cols) {
  std::vector<double> out(values.size());
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < cols; ++c) out[c * rows + r] = values[r * cols + c];
  }
  return out;
}

template <Major a_major, Major b_major, int registers>
void probe_product(const char* name, bool required) {
  constexpr int n = 2 * registers;
  const std::vector<double> a = integers(kRows * kDepth, 7), b = integers(n * kDepth, 5);
  const on_device::Array left(DType::kBFloat16,
                              a_major == Major::kK ? a : transposed(a, kRows, kDepth));
  const on_device::Array right(DType::kBFloat16,
                               b_major == Major::kK ? b : transposed(b, n, kDepth));
  const TensorMap left_map =
      make_tensor_map(DType::kBFloat16, left.data(), {{64, 1, 64}, {64, 64, 64}});
  const TensorMap right_map =
      b_major == Major::kK
          ? make_tensor_map(DType::kBFloat16, right.data(), {{64, 1, 64}, {n, 64, n}})
          : make_tensor_map(DType::kBFloat16, right.data(),
                            {{64, 1, 64}, {kDepth, n, 64}, {n / 64, 64, n / 64}});
  on_device::Array out(DType::kFloat32, kRows * n);
  on_device::Vector<int> status(std::vector<int>{0});
  launch({"probe_wgmma", 1, 128, sizeof(ProductShared<n>)}, nullptr,
         probe_wgmma<a_major, b_major, registers>, left_map, right_map,
         static_cast<float*>(out.data()), status.data());
  report(name, "equal", difference(out.values(), product(a, b, n, kDepth), status.values()[0]),
         required);
}

/// Of a matrix of `rows` rows of 64: those at first, first + 1, ..., zero where there is none.
std::vector<double> box_of(const std::vector<double>& matrix, int rows, int first, int column) {
  std::vector<double> box(kRows * 64);
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < 64; ++c) {
      const bool exists = 0 <= first + r && first + r < rows && 0 <= column + c && column + c < 64;
      if (exists) box[r * 64 + c] = matrix[(first + r) * 64 + column + c];
    }
  }
  return box;
}

void probe_bounds(const char* name, bool required, int x, int y) {
  constexpr int kExisting = 100;
  const std::vector<double> values = integers(kExisting * 64, 100);
  const on_device::Array matrix(DType::kBFloat16, values);
  const TensorMap map =
      make_tensor_map(DType::kBFloat16, matrix.data(), {{64, 1, 64}, {kExisting, 64, 64}});
  on_device::Array out(DType::kBFloat16, kRows * 64);
  on_device::Vector<int> status(std::vector<int>{0});
  launch({"probe_load", 1, 128, sizeof(BoxShared)}, nullptr, probe_load, map, 2,
         Position{x, y, 0, 0}, static_cast<BFloat16*>(out.data()), status.data());
  report(name, "equal",
         difference(out.values(), box_of(values, kExisting, y, x), status.values()[0]), required);
}

template <bool fences>
void probe_copies(const char* name, bool required) {
  constexpr int kTiles = 64, kCols = 128, kTerms = kTiles * kDepth;
  const std::vector<double> a = integers(kRows * kTerms, 3), b = integers(kCols * kTerms, 3);
  const on_device::Array left(DType::kBFloat16, a), right(DType::kBFloat16, b);
  const TensorMap map =
      make_tensor_map(DType::kBFloat16, right.data(), {{kTerms, 1, 64}, {kCols, kTerms, kCols}});
  on_device::Array out(DType::kFloat32, kRows * kCols);
  on_device::Vector<int> status(std::vector<int>{0});
  launch({"probe_gather", 1, 256, sizeof(GatherShared)}, nullptr, probe_gather<fences>,
         static_cast<const BFloat16*>(left.data()), map, kTiles, static_cast<float*>(out.data()),
         status.data());
  report(name, "equal", difference(out.values(), product(a, b, kCols, kTerms), status.values()[0]),
         required);
}

#ifndef FOMOE_EMULATION

/// Rows [first, first + count) of a matrix as a map that has no others, whichever they are: the
/// last row is the last of 2^30, and the rest of the address wraps around.
constexpr int kRaggedRows = 200, kFirst = 70, kCount = 41;

TensorMap ragged_map(const void* matrix) {
  const int64_t row = 64, wrap = (int64_t{1} << 34) - row;
  return make_tensor_map(
      DType::kBFloat16, matrix,
      {{64, 1, 64}, {kInfinite, row, 64}, {kInfinite, row, 1}, {kInfinite + 1, wrap, 1}});
}

Position ragged_position(int row) {
  return {0, static_cast<int>(kInfinite) - kCount + row, kFirst + kCount,
          static_cast<int>(kInfinite)};
}

void probe_ragged_load(const char* name, bool required) {
  const std::vector<double> values = integers(kRaggedRows * 64, 100);
  const on_device::Array matrix(DType::kBFloat16, values);
  on_device::Array out(DType::kBFloat16, kRows * 64);
  on_device::Vector<int> status(std::vector<int>{0});
  launch({"probe_load", 1, 128, sizeof(BoxShared)}, nullptr, probe_load, ragged_map(matrix.data()),
         4, ragged_position(0), static_cast<BFloat16*>(out.data()), status.data());
  const std::vector<double> segment(values.begin() + kFirst * 64,
                                    values.begin() + (kFirst + kCount) * 64);
  report(name, "equal", difference(out.values(), box_of(segment, kCount, 0, 0), status.values()[0]),
         required);
}

void probe_ragged_store(const char* name, bool required) {
  const std::vector<double> tile = integers(kRows * 64, 100);
  std::vector<double> expected(kRaggedRows * 64, 0.0);
  const on_device::Array from(DType::kBFloat16, tile);
  const on_device::Array to(DType::kBFloat16, expected);
  on_device::Vector<int> status(std::vector<int>{0});
  const TensorMap tile_map =
      make_tensor_map(DType::kBFloat16, from.data(), {{64, 1, 64}, {64, 64, 64}});
  launch({"probe_store", 1, 128, sizeof(BoxShared)}, nullptr, probe_store, tile_map,
         ragged_map(to.data()), 4, ragged_position(0), status.data());
  std::copy(tile.begin(), tile.begin() + kCount * 64, expected.begin() + kFirst * 64);
  report(name, "equal", difference(to.values(), expected, status.values()[0]), required);
}

#endif

void probe_store_bounds(const char* name, bool required) {
  constexpr int kExisting = 100, kAt = 80;
  const std::vector<double> tile = integers(kRows * 64, 100);
  std::vector<double> expected((kExisting + kRows) * 64, 0.0);  // room where nothing may be written
  const on_device::Array from(DType::kBFloat16, tile), to(DType::kBFloat16, expected);
  on_device::Vector<int> status(std::vector<int>{0});
  const TensorMap tile_map =
      make_tensor_map(DType::kBFloat16, from.data(), {{64, 1, 64}, {64, 64, 64}});
  const TensorMap map = make_tensor_map(DType::kBFloat16, to.data(),
                                        {{64, 1, 64}, {kExisting, 64, 64}, {1, kExisting * 64, 1}});
  launch({"probe_store", 1, 128, sizeof(BoxShared)}, nullptr, probe_store, tile_map, map, 3,
         Position{0, kAt, 0, 0}, status.data());
  std::copy(tile.begin(), tile.begin() + (kExisting - kAt) * 64, expected.begin() + kAt * 64);
  report(name, "equal", difference(to.values(), expected, status.values()[0]), required);
}

/// What a probe throws is its answer: the others still have their turn.
template <typename... Arguments>
void ask(const char* name, bool required, void (*probe)(const char*, bool, Arguments...),
         Arguments... arguments) {
  try {
    probe(name, required, arguments...);
  } catch (const std::exception& error) {
    report(name, "equal", error.what(), required);
  }
}

void run_probes() {
  constexpr Major kK = Major::kK, kMN = Major::kMN;
  ask("wgmma n=128, a K-major, b K-major", true, probe_product<kK, kK, 64>);
  ask("wgmma n=128, a K-major, b MN-major", true, probe_product<kK, kMN, 64>);
  ask("wgmma n=128, a MN-major, b K-major", true, probe_product<kMN, kK, 64>);
  ask("wgmma n=128, a MN-major, b MN-major", true, probe_product<kMN, kMN, 64>);
  ask("wgmma n=256, a K-major, b K-major", true, probe_product<kK, kK, 128>);
  ask("wgmma n=256, a MN-major, b MN-major", true, probe_product<kMN, kMN, 128>);
  ask("a TMA box inside the array", true, probe_bounds, 0, 20);
  ask("a TMA box past the last row: zeros, all bytes counted", true, probe_bounds, 0, 90);
  ask("a TMA box past the last column: zeros, all bytes counted", true, probe_bounds, 24, 20);
  ask("a TMA box before the first row: zeros, all bytes counted", true, probe_bounds, 0, -30);
  ask("a TMA box outside of the array: zeros, all bytes counted", true, probe_bounds, 0, 200);
  ask("a TMA store drops rows past the array's end", true, probe_store_bounds);
  ask("cp.async with noinc arrival, proxy fence, wgmma", true, probe_copies<true>);
#ifndef FOMOE_EMULATION
  ask("cp.async with noinc arrival, no proxy fence, wgmma", false, probe_copies<false>);
  ask("a ragged 4-D load gives zeros past the group's end", false, probe_ragged_load);
  ask("a ragged 4-D store drops rows past the group's end", false, probe_ragged_store);
#endif
}

}  // namespace

int main() {
  try {
#ifndef FOMOE_EMULATION
    if (fomoe::cuda_compute_capability() != 90) {
      std::fprintf(stderr, "error: the probes are of Hopper: compute capability 9.0, here is %d\n",
                   fomoe::cuda_compute_capability());
      return 2;
    }
#endif
    run_probes();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return all_required_are_ok ? 0 : 1;
}
