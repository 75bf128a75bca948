// SPDX-License-Identifier: Apache-2.0
#include "measure.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

namespace bench {
namespace {

constexpr size_t kMinRepetitions = 10, kMostRepetitions = 10000;
constexpr int64_t kCachesOfSets = 3;
constexpr int64_t kMostSets = 64;
constexpr int64_t kUnit = 16;  // of copies

double quantile(const std::vector<double>& sorted, double q) {
  const double place = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(place);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (place - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

/// Arrays to copy between, `bytes` read and written in all.
struct CopyArrays {
  CopyArrays(Device& device, double bytes, int num_sets)
      : half(std::max<int64_t>(std::llround(bytes / 2) / kUnit, 1) * kUnit) {
    for (int set = 0; set < num_sets; ++set) {
      arrays.push_back(random_array(device, fomoe::DType::kBFloat16, half / 2));
      arrays.emplace_back(device, half);
      pairs.emplace_back(arrays[arrays.size() - 1].data(), arrays[arrays.size() - 2].data());
    }
  }

  int64_t half;
  std::vector<Memory> arrays;
  std::vector<std::pair<void*, const void*>> pairs;
};

Json ratio_of(const std::vector<double>& ceiling, const std::vector<double>& own) {
  const Spread ratio = paired_ratio(ceiling, own);
  return Json().add("median", ratio.median).add("quartiles", {ratio.low, ratio.high});
}

double median(const std::vector<double>& numbers) { return spread(numbers).median; }

}  // namespace

Spread spread(std::vector<double> numbers) {
  std::sort(numbers.begin(), numbers.end());
  return {quantile(numbers, 0.25), quantile(numbers, 0.5), quantile(numbers, 0.75),
          numbers.front()};
}

Spread paired_ratio(const std::vector<double>& numerators,
                    const std::vector<double>& denominators) {
  std::vector<double> ratios;
  for (size_t i = 0; i < numerators.size(); ++i) ratios.push_back(numerators[i] / denominators[i]);
  return spread(ratios);
}

std::vector<std::vector<double>> interleave(const std::vector<Stopwatch*>& stopwatches,
                                            double seconds) {
  using Clock = std::chrono::steady_clock;
  const size_t count = stopwatches.size();
  std::vector<std::vector<double>> times(count);
  const size_t least = seconds > 0 ? kMinRepetitions : 1;
  const auto begin = Clock::now();
  for (size_t repetition = 0; repetition < kMostRepetitions; ++repetition) {
    const std::chrono::duration<double> spent = Clock::now() - begin;
    if (repetition >= least && spent.count() >= seconds) break;
    for (size_t i = 0; i < count; ++i) {
      const bool reversed = repetition / count % 2 != 0;
      const size_t place = (i + repetition) % count;
      const size_t which = reversed ? count - 1 - place : place;
      times[which].push_back(stopwatches[which]->run());
    }
  }
  return times;
}

void add_times(Json& line, const std::vector<double>& microseconds) {
  const Spread own = spread(microseconds);
  line.add("runs", static_cast<int64_t>(microseconds.size()))
      .add("median_us", own.median)
      .add("quartiles_us", {own.low, own.high})
      .add("best_us", own.best);
}

Session::Session(const Program& program, const Arguments& arguments)
    : program_(program),
      arguments_(arguments),
      device_(open_device(arguments.device)),
      ops_(arguments.device == "cpu" ? make_cpu_ops(*device_) : make_cuda_ops(*device_)),
      product_ops_(make_cuda_product_ops(*device_)),
      dense_(open_cublas(arguments.cublas, *device_)) {}

bool Session::wants(const std::string& op) const {
  return std::find(arguments_.ops.begin(), arguments_.ops.end(), op) != arguments_.ops.end();
}

int Session::num_sets(int64_t bytes_of_a_set) const {
  if (!arguments_.cold) return 1;
  const int64_t wanted =
      kCachesOfSets * device_->cache_bytes() / std::max<int64_t>(bytes_of_a_set, 1);
  return static_cast<int>(std::clamp<int64_t>(wanted + 1, 1, kMostSets));
}

fomoe::KernelPath Session::path(const std::optional<fomoe::KernelPath>& wanted,
                                const fomoe::ProductOperands& operands) const {
  const int capability = device_->compute_capability();
  if (!wanted) return fomoe::choose_path(capability, operands);
  if (*wanted == fomoe::KernelPath::kSimple) return *wanted;
  const char* obstacle = fomoe::obstacle_to_tensor_cores(operands);
  if (obstacle) {
    throw UsageError(std::string("--path: ") + fomoe::name_of(*wanted) +
                     " does not take this: " + obstacle);
  }
  if (*wanted == fomoe::KernelPath::kSm90 && capability != 90) {
    throw UsageError("--path: sm90 runs on compute capability 9.0 only, this is " +
                     std::to_string(capability / 10) + "." + std::to_string(capability % 10));
  }
  return *wanted;
}

std::unique_ptr<Stopwatch> Session::stopwatch(const Work& work, int num_sets) {
  return device_->stopwatch(work, num_sets, {arguments_.cold, arguments_.graph});
}

Json Session::labels(const char* op, const Shape& shape, const char* dtype) const {
  Json line;
  line.add("program", program_.name).add("op", op).add("shape", shape.name);
  line.add("T", shape.tokens).add("H", shape.dim).add("I", shape.expert_dim);
  line.add("E", shape.num_experts).add("K", shape.top_k);
  return line.add("dtype", dtype);
}

void Session::measure(const Measurement& m) {
  const CopyArrays copy_arrays(*device_, m.bytes, m.num_sets);
  const auto copies = device_->copies(copy_arrays.pairs, copy_arrays.half);
  std::vector<std::unique_ptr<Stopwatch>> stopwatches;
  stopwatches.push_back(stopwatch(m.work, m.num_sets));
  for (const auto& copy : copies) stopwatches.push_back(stopwatch(copy.second, m.num_sets));
  const bool has_dense = dense_ && !m.dense.empty();
  if (has_dense) stopwatches.push_back(stopwatch(dense_->products(m.dtype, m.dense), 1));
  std::vector<Stopwatch*> pointers;
  for (const auto& each : stopwatches) pointers.push_back(each.get());
  const auto times = interleave(pointers, arguments_.seconds);

  size_t copy = 1;
  for (size_t i = 1; i <= copies.size(); ++i) {
    if (median(times[i]) < median(times[copy])) copy = i;
  }
  const double us = median(times[0]);
  Json line = m.labels;
  line.add("calls_per_run", stopwatches[0]->calls()).add("sets", m.num_sets);
  add_times(line, times[0]);
  line.add("bytes", m.bytes).add("gb_per_s", m.bytes / us / 1e3);
  if (m.flops > 0) line.add("flops", m.flops).add("tflops", m.flops / us / 1e6);
  line.add("copy", Json()
                       .add("by", copies[copy - 1].first)
                       .add("median_us", median(times[copy]))
                       .add("gb_per_s", 2.0 * static_cast<double>(copy_arrays.half) /
                                            median(times[copy]) / 1e3));
  line.add("of_copy", ratio_of(times[copy], times[0]));
  if (has_dense) {
    const double dense_us = median(times.back());
    line.add("dense", Json()
                          .add("by", dense_->name())
                          .add("median_us", dense_us)
                          .add("tflops", m.flops / dense_us / 1e6));
    line.add("of_dense", ratio_of(times.back(), times[0]));
  } else if (!m.dense.empty()) {
    line.add_null("dense").add_null("of_dense");
    line.add("dense_missing", "no cuBLAS was found: see --cublas");
  }
  print(line);
}

void Session::print(const Json& line) const {
  Json whole = line;
  whole.add("routing", name_of(arguments_.routing));
  if (arguments_.routing == RoutingKind::kZipf) {
    whole.add("zipf_exponent", arguments_.zipf_exponent);
  }
  whole.add("cache", arguments_.cold ? "cold" : "warm");
  whole.add("launch", arguments_.graph && device_->num_threads() == 0 ? "graph" : "calls");
  whole.add("device", device_->name()).add("threads", device_->num_threads());
  std::printf("%s\n", whole.text().c_str());
  std::fflush(stdout);
}

}  // namespace bench
