// SPDX-License-Identifier: Apache-2.0
#include "fomoe/destinations.h"

#include "harness.h"
#include "samples.h"

using Ints = std::vector<int32_t>;

namespace {

template <typename Function>
Ints of(Function function, const Ints& ids, int64_t top_k, const Ints& group_of_expert,
        int64_t num_groups) {
  const int64_t num_tokens = static_cast<int64_t>(ids.size()) / top_k;
  Ints out(num_tokens * fomoe::max_destinations(top_k, num_groups), -7);
  function(ids.data(), num_tokens, top_k, group_of_expert.data(), num_groups, out.data());
  return out;
}

}  // namespace

TEST(every_group_of_a_token_stands_once_and_in_order) {
  // Experts 0 and 3 are in group 1, expert 1 in group 0, expert 2 in none.
  CHECK_EQUAL(of(fomoe::cpu::destinations, {3, 1, 0, 2, 2, -1, 0, -1, 3}, 3, {1, 0, -1, 1}, 2),
              (Ints{0, 1, -1, -1, 1, -1}));
}

TEST(random_ids_equal_the_reference_for_any_number_of_groups) {
  for (const int64_t num_groups : {1, 2, 5, 63, 64, 65, 200}) {
    for (uint32_t seed = 0; seed < 20; ++seed) {
      constexpr int64_t kExperts = 300, kTopK = 6;
      Ints groups(kExperts);
      for (int64_t e = 0; e < kExperts; ++e) {
        groups[e] = static_cast<int32_t>((e * 7919 + seed) % (num_groups + 1)) - 1;
      }
      const Ints ids = samples::random_ids(kTopK * seed, kExperts, seed);
      CHECK_EQUAL(of(fomoe::cpu::destinations, ids, kTopK, groups, num_groups),
                  of(fomoe::reference::destinations, ids, kTopK, groups, num_groups));
    }
  }
}

TEST(without_groups_there_is_nothing_to_say) {
  CHECK_EQUAL(of(fomoe::cpu::destinations, {0, 1}, 1, {-1, -1}, 0), Ints{});
}
