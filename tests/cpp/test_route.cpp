// SPDX-License-Identifier: Apache-2.0
#include "fomoe/route.h"

#include "fomoe/routing.h"
#include "harness.h"
#include "samples.h"

using Ints = std::vector<int32_t>;

namespace {

struct Result {
  Ints slot_to_row, row_to_slot, offsets;
  bool operator==(const Result&) const = default;
};

Result routed(const Ints& ids, const Ints& expert_map, int64_t num_local_experts,
              int64_t capacity = fomoe::kDropless) {
  Result result = {Ints(ids.size(), -7), Ints(ids.size(), -7), Ints(num_local_experts + 1, -7)};
  std::vector<char> workspace(fomoe::cpu::route_workspace_bytes(num_local_experts));
  fomoe::cpu::route(ids.data(), static_cast<int64_t>(ids.size()), expert_map.data(),
                    num_local_experts, capacity, result.slot_to_row.data(),
                    result.row_to_slot.data(), result.offsets.data(), workspace.data());
  return result;
}

}  // namespace

TEST(slots_are_ordered_by_local_expert_then_by_slot) {
  // Expert 1 is a ghost; expert 2 is local 0 and expert 0 is local 1. Slot 5 has no expert.
  const Result result = routed({0, 2, 1, 0, 2, -1}, {1, -1, 0}, 2);
  CHECK_EQUAL(result.offsets, (Ints{0, 2, 4}));
  CHECK_EQUAL(result.row_to_slot, (Ints{1, 4, 0, 3, -1, -1}));
  CHECK_EQUAL(result.slot_to_row, (Ints{2, 0, -1, 3, 1, -1}));
}

TEST(an_expert_keeps_its_first_slots_up_to_the_capacity) {
  // Local expert 0 is chosen by slots 0, 1, 3, 4 and local expert 1 by slot 2.
  const Ints ids = {0, 0, 1, 0, 0, -1}, expert_map = {0, 1};
  const Result two = routed(ids, expert_map, 2, 2);
  CHECK_EQUAL(two.offsets, (Ints{0, 2, 3}));
  CHECK_EQUAL(two.row_to_slot, (Ints{0, 1, 2, -1, -1, -1}));
  CHECK_EQUAL(two.slot_to_row, (Ints{0, 1, 2, -1, -1, -1}));
  CHECK_EQUAL(routed(ids, expert_map, 2, 0).slot_to_row, Ints(6, -1));
  CHECK_EQUAL(routed(ids, expert_map, 2, 0).offsets, (Ints{0, 0, 0}));
  CHECK(routed(ids, expert_map, 2, 4) == routed(ids, expert_map, 2));
  CHECK(routed(ids, expert_map, 2, int64_t{1} << 40) == routed(ids, expert_map, 2));
}

TEST(random_ids_equal_the_reference) {
  const Ints expert_map = {1, -1, 2, -1, 0};
  for (int64_t capacity : {int64_t{0}, int64_t{1}, int64_t{3}, int64_t{8}, fomoe::kDropless}) {
    for (uint32_t seed = 0; seed < 20; ++seed) {
      const Ints ids = samples::random_ids(3 * seed, 5, seed);
      Result expected = {Ints(ids.size()), Ints(ids.size()), Ints(4)};
      fomoe::reference::route(ids.data(), static_cast<int64_t>(ids.size()), expert_map.data(), 3,
                              capacity, expected.slot_to_row.data(), expected.row_to_slot.data(),
                              expected.offsets.data());
      const Result actual = routed(ids, expert_map, 3, capacity);
      CHECK(actual == expected);
      const int64_t num_tokens = static_cast<int64_t>(ids.size()) / 3;
      CHECK(!fomoe::cpu::defect_of({actual.slot_to_row.data(), actual.row_to_slot.data(),
                                    actual.offsets.data(), num_tokens, 3, 3}));
    }
  }
}

TEST(a_site_without_experts_routes_nothing) {
  const Result result = routed({0, 1}, {-1, -1}, 0);
  CHECK_EQUAL(result.offsets, (Ints{0}));
  CHECK_EQUAL(result.slot_to_row, (Ints{-1, -1}));
  CHECK_EQUAL(result.row_to_slot, (Ints{-1, -1}));
}

TEST(the_first_value_outside_is_found_in_any_chunk) {
  Ints values(10000, 3);
  CHECK_EQUAL(fomoe::cpu::first_outside(values.data(), 10000, -1, 4), -1);
  values[9000] = 4;
  values[9999] = -2;
  CHECK_EQUAL(fomoe::cpu::first_outside(values.data(), 10000, -1, 4), 9000);
  CHECK_EQUAL(fomoe::cpu::first_outside(values.data(), 10000, -1, 5), 9999);
  CHECK_EQUAL(fomoe::cpu::first_outside(values.data(), 0, -1, 4), -1);
}

TEST(a_routing_that_is_not_a_result_of_route_is_found) {
  const Ints slot_to_row = {1, 0, -1, 2}, row_to_slot = {1, 0, 3, -1}, offsets = {0, 1, 3};
  const auto defect = [&](Ints slots, Ints rows, Ints bounds) {
    const char* text = fomoe::cpu::defect_of({slots.data(), rows.data(), bounds.data(), 2, 2, 2});
    return std::string(text ? text : "none");
  };
  CHECK_EQUAL(defect(slot_to_row, row_to_slot, offsets), "none");
  CHECK_EQUAL(defect({3, 0, -1, 2}, row_to_slot, offsets),
              "slot_to_row must be in [-1, offsets[-1])");
  CHECK_EQUAL(defect(slot_to_row, {1, 4, 3, -1}, offsets),
              "row_to_slot must be in [0, T*K) before offsets[-1]");
  CHECK_EQUAL(defect(slot_to_row, {1, 0, 3, 2}, offsets),
              "row_to_slot must be -1 from offsets[-1] on");
  const std::string not_inverse = "slot_to_row and row_to_slot must be inverse to each other";
  CHECK_EQUAL(defect(slot_to_row, {0, 1, 3, -1}, offsets), not_inverse);
  CHECK_EQUAL(defect({1, 0, 1, 2}, row_to_slot, offsets), not_inverse);  // slot 2 shares row 1
  CHECK_EQUAL(defect(slot_to_row, row_to_slot, {0, 3, 2}), "offsets must ascend");
  CHECK_EQUAL(defect(slot_to_row, row_to_slot, {1, 1, 3}), "offsets must begin with 0");
  CHECK_EQUAL(defect(slot_to_row, row_to_slot, {0, 1, 5}), "offsets must end within the rows");
}
