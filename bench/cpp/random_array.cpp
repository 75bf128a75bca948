// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <map>
#include <random>

#include "device.h"

namespace bench {
namespace {

// Prime, so that no row of an array begins with the same numbers as another one; drawing each
// number of an array of gigabytes would take longer than the measurement.
constexpr int64_t kPeriod = 1048573;

std::vector<char> draw(fomoe::DType dtype, double deviation) {
  std::mt19937_64 engine(1);
  std::normal_distribution<double> normal(0.0, deviation);
  std::vector<char> bytes(static_cast<size_t>(kPeriod * fomoe::size_of(dtype)));
  fomoe::dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    T* values = reinterpret_cast<T*>(bytes.data());
    for (int64_t i = 0; i < kPeriod; ++i) {
      values[i] = fomoe::from_accumulate<T>(static_cast<fomoe::Accumulate<T>>(normal(engine)));
    }
  });
  return bytes;
}

const std::vector<char>& drawn(fomoe::DType dtype, double deviation) {
  static std::map<std::pair<fomoe::DType, double>, std::vector<char>> cache;
  std::vector<char>& period = cache[{dtype, deviation}];
  if (period.empty()) period = draw(dtype, deviation);
  return period;
}

}  // namespace

Memory random_array(Device& device, fomoe::DType dtype, int64_t count, double deviation) {
  const std::vector<char>& period = drawn(dtype, deviation);
  Memory memory(device, count * fomoe::size_of(dtype));
  char* base = static_cast<char*>(memory.data());
  int64_t filled = std::min(static_cast<int64_t>(period.size()), memory.bytes());
  device.copy(base, period.data(), filled);
  while (filled < memory.bytes()) {
    const int64_t bytes = std::min(filled, memory.bytes() - filled);
    device.copy(base + filled, base, bytes);
    filled += bytes;
  }
  return memory;
}

}  // namespace bench
