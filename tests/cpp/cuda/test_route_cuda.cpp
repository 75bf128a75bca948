// SPDX-License-Identifier: Apache-2.0
#include "fomoe/route.h"

#include "cuda/on_device.h"
#ifdef FOMOE_EMULATION
#include "counters.h"
#endif

namespace {

using Ints = std::vector<int32_t>;

struct Result {
  Ints slot_to_row, row_to_slot, offsets;
  bool operator==(const Result&) const = default;
};

Result on_cpu(const Ints& ids, const Ints& expert_map, int64_t num_local, int64_t capacity) {
  Result result = {Ints(ids.size()), Ints(ids.size()), Ints(num_local + 1)};
  std::vector<char> workspace(fomoe::cpu::route_workspace_bytes(num_local));
  fomoe::cpu::route(ids.data(), static_cast<int64_t>(ids.size()), expert_map.data(), num_local,
                    capacity, result.slot_to_row.data(), result.row_to_slot.data(),
                    result.offsets.data(), workspace.data());
  return result;
}

Result on_gpu(const Ints& ids, const Ints& expert_map, int64_t num_local, int64_t capacity) {
  const auto num_slots = static_cast<int64_t>(ids.size());
  const on_device::Vector<int32_t> device_ids(ids), device_map(expert_map);
  on_device::Vector<int32_t> slot_to_row(num_slots), row_to_slot(num_slots), offsets(num_local + 1);
  const on_device::Memory workspace(fomoe::cuda::route_workspace_bytes(num_slots, num_local));
  fomoe::cuda::route(device_ids.data(), num_slots, device_map.data(),
                     static_cast<int64_t>(expert_map.size()), num_local, capacity,
                     slot_to_row.data(), row_to_slot.data(), offsets.data(), workspace.data(),
                     nullptr);
  return {slot_to_row.values(), row_to_slot.values(), offsets.values()};
}

/// Every third expert is a ghost, the others are resident in descending order.
Ints map_with_ghosts(int32_t num_experts, int32_t& num_local) {
  Ints expert_map(num_experts, -1);
  num_local = 0;
  for (int32_t e = num_experts - 1; e >= 0; --e) {
    if (e % 3 != 1) expert_map[e] = num_local++;
  }
  return expert_map;
}

void check_equals_cpu(int64_t num_slots, int32_t num_experts, uint32_t seed) {
  int32_t num_local = 0;
  const Ints expert_map = map_with_ghosts(num_experts, num_local);
  const Ints ids = samples::random_ids(num_slots, num_experts, seed);
  const int64_t mean = num_slots / num_experts;
  for (const int64_t capacity : {int64_t{0}, int64_t{1}, mean + 1, fomoe::kDropless}) {
    CHECK(on_gpu(ids, expert_map, num_local, capacity) ==
          on_cpu(ids, expert_map, num_local, capacity));
  }
}

}  // namespace

TEST(slots_are_ordered_by_local_expert_then_by_slot) {
  // Expert 1 is a ghost; expert 2 is local 0 and expert 0 is local 1. Slot 5 has no expert.
  const Result result = on_gpu({0, 2, 1, 0, 2, -1}, {1, -1, 0}, 2, fomoe::kDropless);
  CHECK_EQUAL(result.offsets, (Ints{0, 2, 4}));
  CHECK_EQUAL(result.row_to_slot, (Ints{1, 4, 0, 3, -1, -1}));
  CHECK_EQUAL(result.slot_to_row, (Ints{2, 0, -1, 3, 1, -1}));
}

TEST(few_slots_equal_the_cpu) {
  for (const int64_t num_slots : {0, 1, 31, 32, 33, 257, 1000}) {
    for (const int32_t num_experts : {1, 5, 70}) check_equals_cpu(num_slots, num_experts, 1);
  }
}

TEST(many_slots_equal_the_cpu) {
  for (const int64_t num_slots : {4096, 4097, 9001}) check_equals_cpu(num_slots, 40, 2);
}

TEST(the_largest_number_of_experts_equals_the_cpu) {
  Ints expert_map(4096);
  for (int32_t e = 0; e < 4096; ++e) expert_map[e] = 4095 - e;
  for (const int64_t num_slots : {300, 5000}) {
    const Ints ids = samples::random_ids(num_slots, 4096, 3);
    CHECK(on_gpu(ids, expert_map, 4096, 2) == on_cpu(ids, expert_map, 4096, 2));
  }
  CHECK(on_gpu({0}, {0}, 4096, 2) == on_cpu({0}, {0}, 4096, 2));
}

TEST(all_slots_may_choose_one_expert_or_none) {
  for (const int64_t num_slots : {100, 6000}) {
    for (const int32_t id : {-1, 0, 1, 2}) {
      const Ints ids(num_slots, id), expert_map = {1, -1, 0};
      for (const int64_t capacity : {int64_t{70}, fomoe::kDropless}) {
        CHECK(on_gpu(ids, expert_map, 2, capacity) == on_cpu(ids, expert_map, 2, capacity));
      }
    }
  }
}

TEST(a_site_without_experts_routes_nothing) {
  for (const int64_t num_slots : {0, 2, 5000}) {
    const Ints ids(num_slots, 0);
    CHECK(on_gpu(ids, {-1, -1}, 0, fomoe::kDropless) == on_cpu(ids, {-1, -1}, 0, fomoe::kDropless));
  }
}

TEST(wrong_ids_and_maps_count_as_missing) {
  constexpr int32_t kLowest = std::numeric_limits<int32_t>::min(), kHighest = ~kLowest;
  for (const int64_t num_slots : {200, 5000}) {
    Ints ids = samples::random_ids(num_slots, 6, 4), repaired = ids;
    const Ints wrong = {-2, 6, kLowest, kHighest};
    for (int64_t slot = 0; slot < num_slots; slot += 7) {
      ids[slot] = wrong[slot / 7 % 4];
      repaired[slot] = -1;
    }
    CHECK(on_gpu(ids, {0, 3, -2, kHighest, kLowest, 2}, 3, 50) ==
          on_cpu(repaired, {0, -1, -1, -1, -1, 2}, 3, 50));
  }
}

TEST(the_same_call_gives_the_same_bits) {
  const Ints ids = samples::random_ids(5000, 40, 5);
  int32_t num_local = 0;
  const Ints expert_map = map_with_ghosts(40, num_local);
  CHECK(on_gpu(ids, expert_map, num_local, 90) == on_gpu(ids, expert_map, num_local, 90));
}

TEST(more_experts_than_the_tables_hold_are_refused) {
  bool is_refused = false;
  try {
    on_gpu({0}, {0}, 4097, 1);
  } catch (const std::invalid_argument&) {
    is_refused = true;
  }
  CHECK(is_refused);
}

#ifdef FOMOE_EMULATION

TEST(reads_the_ids_of_a_block_twice_and_writes_each_index_once) {
  const int64_t num_slots = 1000, bytes = 4 * num_slots;
  const on_device::Vector<int32_t> ids(samples::random_ids(num_slots, 8, 6));
  const on_device::Vector<int32_t> expert_map(Ints{0, 1, 2, 3, 4, 5, 6, 7});
  const on_device::Vector<int32_t> slot_to_row(num_slots), row_to_slot(num_slots), offsets(9);
  const auto counters = fomoe::emulation::count([&] {
    fomoe::cuda::route(ids.data(), num_slots, expert_map.data(), 8, 8, fomoe::kDropless,
                       slot_to_row.data(), row_to_slot.data(), offsets.data(), nullptr, nullptr);
  });
  CHECK_EQUAL(counters.size(), 1u);
  const auto& counts = counters.at("route_scatter");
  CHECK_EQUAL(counts.launches, 1);
  CHECK_EQUAL(counts.loads(ids.data(), bytes).bytes, 2 * bytes);
  CHECK_EQUAL(counts.stores(slot_to_row.data(), bytes).bytes, bytes);
  CHECK_EQUAL(counts.stores(row_to_slot.data(), bytes).bytes, bytes);
  CHECK_EQUAL(counts.stores(row_to_slot.data(), bytes).distinct_bytes, bytes);
  CHECK_EQUAL(counts.stores().bytes, 2 * bytes + 4 * 9);
}

#endif
