// SPDX-License-Identifier: Apache-2.0
#include "fomoe/destinations.h"

#include "cuda/on_device.h"
#ifdef FOMOE_EMULATION
#include "counters.h"
#endif

namespace {

using Ints = std::vector<int32_t>;

Ints on_cpu(const Ints& ids, int64_t top_k, const Ints& groups, int64_t num_groups) {
  const int64_t num_tokens = static_cast<int64_t>(ids.size()) / top_k;
  Ints result(num_tokens * fomoe::num_destinations(top_k, num_groups));
  fomoe::cpu::destinations(ids.data(), num_tokens, top_k, groups.data(), num_groups, result.data());
  return result;
}

Ints on_gpu(const Ints& ids, int64_t top_k, const Ints& groups, int64_t num_groups) {
  const int64_t num_tokens = static_cast<int64_t>(ids.size()) / top_k;
  const on_device::Vector<int32_t> device_ids(ids), device_groups(groups);
  on_device::Vector<int32_t> result(num_tokens * fomoe::num_destinations(top_k, num_groups));
  fomoe::cuda::destinations(device_ids.data(), num_tokens, top_k, device_groups.data(),
                            static_cast<int64_t>(groups.size()), num_groups, result.data(),
                            nullptr);
  return result.values();
}

}  // namespace

TEST(a_token_goes_once_to_every_group_of_its_experts_in_ascending_order) {
  // Experts 0 and 3 belong to group 2, 1 to group 0, 4 to group 1; nobody has expert 2.
  CHECK_EQUAL(on_gpu({0, 3, 1, 2, -1, 2, 0, 4, 1}, 3, {2, 0, -1, 2, 1}, 3),
              (Ints{0, 2, -1, -1, -1, -1, 0, 1, 2}));
}

TEST(any_shape_equals_the_cpu) {
  for (const int64_t top_k : {1, 3, 8, 256, 300}) {
    for (const int64_t num_tokens : {0, 1, 32, 85, 86, 200}) {
      for (const int32_t num_groups : {0, 1, 4, 40}) {
        const Ints groups = num_groups ? samples::random_ids(50, num_groups, 1) : Ints(50, -1);
        const Ints ids = samples::random_ids(num_tokens * top_k, 50, 2);
        CHECK(on_gpu(ids, top_k, groups, num_groups) == on_cpu(ids, top_k, groups, num_groups));
      }
    }
  }
}

TEST(wrong_ids_and_groups_count_as_missing) {
  constexpr int32_t kLowest = std::numeric_limits<int32_t>::min(), kHighest = ~kLowest;
  CHECK_EQUAL(on_gpu({0, 4, kHighest, -2, kLowest, 1, 2, 3, 3}, 3, {1, 2, kHighest, -2}, 2),
              (Ints{1, -1, -1, -1, -1, -1}));
}

TEST(the_largest_top_k_runs_and_a_larger_one_is_refused) {
  const Ints ids = samples::random_ids(4096, 50, 3), groups = samples::random_ids(50, 9, 4);
  CHECK(on_gpu(ids, 4096, groups, 9) == on_cpu(ids, 4096, groups, 9));
  bool is_refused = false;
  try {
    on_gpu(Ints(4097, 0), 4097, {0}, 1);
  } catch (const std::invalid_argument&) {
    is_refused = true;
  }
  CHECK(is_refused);
}

#ifdef FOMOE_EMULATION

TEST(reads_every_id_once_and_writes_every_destination_once) {
  const int64_t num_tokens = 100;
  const on_device::Vector<int32_t> ids(samples::random_ids(8 * num_tokens, 16, 5));
  const on_device::Vector<int32_t> groups(samples::random_ids(16, 4, 6));
  const on_device::Vector<int32_t> result(4 * num_tokens);
  const auto counters = fomoe::emulation::count([&] {
    fomoe::cuda::destinations(ids.data(), num_tokens, 8, groups.data(), 16, 4, result.data(),
                              nullptr);
  });
  CHECK_EQUAL(counters.size(), 1u);
  const auto& counts = counters.at("destinations");
  CHECK_EQUAL(counts.launches, 1);
  CHECK_EQUAL(counts.loads(ids.data(), 32 * num_tokens).bytes, 32 * num_tokens);
  CHECK_EQUAL(counts.stores(result.data(), 16 * num_tokens).distinct_bytes, 16 * num_tokens);
  CHECK_EQUAL(counts.stores().bytes, 16 * num_tokens);
}

#endif
