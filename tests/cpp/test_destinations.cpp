// SPDX-License-Identifier: Apache-2.0
#include "fomoe/destinations.h"

#include "harness.h"
#include "samples.h"

using Ints = std::vector<int32_t>;

namespace {

Ints destinations_of(const Ints& ids, int64_t top_k, const Ints& groups, int64_t num_groups) {
  const int64_t num_tokens = static_cast<int64_t>(ids.size()) / top_k;
  Ints result(num_tokens * fomoe::num_destinations(top_k, num_groups), -7);
  fomoe::cpu::destinations(ids.data(), num_tokens, top_k, groups.data(), num_groups, result.data());
  return result;
}

}  // namespace

TEST(a_token_goes_once_to_every_group_of_its_experts_in_ascending_order) {
  // Experts 0 and 3 belong to group 2, 1 to group 0, 4 to group 1; nobody has expert 2.
  const Ints groups = {2, 0, -1, 2, 1};
  CHECK_EQUAL(destinations_of({0, 3, 1, 2, -1, 2, 0, 4, 1}, 3, groups, 3),
              (Ints{0, 2, -1, -1, -1, -1, 0, 1, 2}));
}

TEST(a_row_is_no_wider_than_the_groups) {
  CHECK_EQUAL(destinations_of({0, 1, 1, 0, 2, 2}, 3, {1, 0, -1}, 2), (Ints{0, 1, 1, -1}));
  CHECK_EQUAL(destinations_of({0, 1}, 2, {-1, -1}, 0), Ints{});
}

TEST(random_ids_equal_the_reference) {
  for (const int32_t num_groups : {1, 2, 5, 20}) {
    for (uint32_t seed = 0; seed < 20; ++seed) {
      const Ints groups = samples::random_ids(12, num_groups, seed + 100);
      const Ints ids = samples::random_ids(4 * seed, 12, seed);
      Ints expected(seed * fomoe::num_destinations(4, num_groups), -7);
      fomoe::reference::destinations(ids.data(), seed, 4, groups.data(), num_groups,
                                     expected.data());
      CHECK_EQUAL(destinations_of(ids, 4, groups, num_groups), expected);
    }
  }
}
