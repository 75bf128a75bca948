// SPDX-License-Identifier: Apache-2.0
#include "fomoe/parallel.h"

#include <mutex>
#include <utility>

#include "harness.h"

namespace {

using Pieces = std::vector<std::pair<int64_t, int64_t>>;

/// The pieces of [0, count) on four threads, in ascending order.
Pieces pieces_of(int64_t count, int64_t grain) {
#ifdef _OPENMP
  omp_set_num_threads(4);
#endif
  Pieces pieces;
  std::mutex mutex;
  fomoe::parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    const std::lock_guard<std::mutex> lock(mutex);
    pieces.emplace_back(begin, end);
  });
  std::sort(pieces.begin(), pieces.end());
  return pieces;
}

}  // namespace

#ifdef _OPENMP
TEST(every_thread_gets_a_piece_when_there_is_enough_work) {
  CHECK(pieces_of(10, 2) == (Pieces{{0, 2}, {2, 5}, {5, 7}, {7, 10}}));
}

TEST(there_are_fewer_pieces_rather_than_pieces_smaller_than_the_grain) {
  CHECK(pieces_of(10, 4) == (Pieces{{0, 5}, {5, 10}}));
}
#endif

TEST(less_work_than_a_grain_stays_on_the_calling_thread) {
  CHECK(pieces_of(3, 4) == (Pieces{{0, 3}}));
  CHECK(pieces_of(0, 4).empty());
}
