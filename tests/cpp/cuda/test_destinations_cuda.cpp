// SPDX-License-Identifier: Apache-2.0
#include "cuda/on_device.h"
#include "fomoe/destinations.h"
#ifdef FOMOE_EMULATION
#include "counters.h"
#endif

namespace {

using Ints = std::vector<int32_t>;

Ints on_gpu(const Ints& ids, int64_t top_k, const Ints& group_of_expert, int64_t num_groups) {
  const int64_t num_tokens = static_cast<int64_t>(ids.size()) / top_k;
  const on_device::Vector<int32_t> device_ids(ids), groups(group_of_expert);
  const on_device::Vector<int32_t> out(
      Ints(num_tokens * fomoe::max_destinations(top_k, num_groups), -7));
  fomoe::cuda::destinations(device_ids.data(), num_tokens, top_k, groups.data(),
                            static_cast<int64_t>(group_of_expert.size()), num_groups, out.data(),
                            nullptr);
  return out.values();
}

void check_equals_cpu(int64_t num_tokens, int64_t top_k, int64_t num_groups) {
  constexpr int64_t kExperts = 300;
  Ints groups(kExperts);
  for (int64_t e = 0; e < kExperts; ++e) {
    groups[e] = static_cast<int32_t>(e * 7919 % (num_groups + 1)) - 1;
  }
  const Ints ids = samples::random_ids(num_tokens * top_k, kExperts, 3);
  Ints expected(num_tokens * fomoe::max_destinations(top_k, num_groups));
  fomoe::cpu::destinations(ids.data(), num_tokens, top_k, groups.data(), num_groups,
                           expected.data());
  CHECK_EQUAL(on_gpu(ids, top_k, groups, num_groups), expected);
}

}  // namespace

TEST(gives_what_the_cpu_gives) {
  for (const int64_t num_groups : {1, 4, 64, 65, 150}) {
    for (const int64_t top_k : {1, 8, 9}) check_equals_cpu(300, top_k, num_groups);
  }
}

TEST(accepts_no_tokens_and_no_groups) {
  check_equals_cpu(0, 2, 4);
  check_equals_cpu(5, 2, 0);
}

TEST(ids_and_groups_out_of_range_count_as_none) {
  constexpr int32_t kLow = -2147483647 - 1, kHigh = 2147483647;
  CHECK_EQUAL(on_gpu({kHigh, 0, kLow, 2, 1, 3}, 3, {1, kHigh, kLow, 0}, 2), (Ints{1, -1, 0, -1}));
}

#ifdef FOMOE_EMULATION

TEST(writes_every_index_once) {
  const Ints ids = samples::random_ids(40 * 8, 16, 3);
  Ints groups(16);
  for (int32_t e = 0; e < 16; ++e) groups[e] = e / 4;
  const on_device::Vector<int32_t> device_ids(ids), device_groups(groups), out(Ints(40 * 4, 0));
  const auto counters = fomoe::emulation::count([&] {
    fomoe::cuda::destinations(device_ids.data(), 40, 8, device_groups.data(), 16, 4, out.data(),
                              nullptr);
  });
  const fomoe::emulation::KernelCounts& counts = counters.at("destinations");
  CHECK_EQUAL(counts.stores().bytes, 40 * 4 * 4);
  CHECK_EQUAL(counts.stores().distinct_bytes, 40 * 4 * 4);
  CHECK_EQUAL(counts.loads(device_ids.data(), 40 * 8 * 4).bytes, 40 * 8 * 4);
}

#endif
