// SPDX-License-Identifier: Apache-2.0
#include <numeric>

#include "cuda/on_device.h"
#include "fomoe/gemm.h"
#include "grouped_gemm/products.h"

namespace {

using fomoe::cuda::most_row_tiles;
using Offsets = std::vector<int32_t>;

struct Tile {
  int32_t expert, begin, end;
  bool operator==(const Tile&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Tile& tile) {
  return out << tile.expert << ":[" << tile.begin << "," << tile.end << ")";
}

std::vector<Tile> tiles_of(const Offsets& offsets, int64_t num_rows) {
  const auto num_experts = static_cast<int64_t>(offsets.size()) - 1;
  const on_device::Vector<int32_t> on_gpu(offsets);
  const on_device::Vector<char> workspace(fomoe::cuda::row_tiles_bytes(num_rows, num_experts));
  const fomoe::cuda::RowTiles tiles =
      fomoe::cuda::list_row_tiles(on_gpu.data(), num_experts, num_rows, workspace.data(), nullptr);
  on_device::synchronize();
  int32_t count = 0;
  on_device::copy_from(&count, tiles.count, sizeof(count));
  CHECK(0 <= count && count <= tiles.most);
  std::vector<fomoe::cuda::RowTile> listed(count);
  on_device::copy_from(listed.data(), tiles.tiles, count * static_cast<int64_t>(sizeof(listed[0])));
  std::vector<Tile> result;
  for (const auto& tile : listed) result.push_back({tile.expert, tile.begin, tile.end});
  return result;
}

Offsets offsets_of(const std::vector<int32_t>& rows_per_expert) {
  Offsets offsets(rows_per_expert.size() + 1);
  std::partial_sum(rows_per_expert.begin(), rows_per_expert.end(), offsets.begin() + 1);
  return offsets;
}

std::vector<Tile> expected_tiles(const Offsets& offsets) {
  std::vector<Tile> tiles;
  for (size_t e = 0; e + 1 < offsets.size(); ++e) {
    for (int32_t row = offsets[e]; row < offsets[e + 1]; row += fomoe::cuda::kTileRows) {
      tiles.push_back(
          {static_cast<int32_t>(e), row, std::min(row + fomoe::cuda::kTileRows, offsets[e + 1])});
    }
  }
  return tiles;
}

std::vector<int32_t> random_counts(int64_t num_experts, uint32_t most, uint32_t seed) {
  std::mt19937 engine(seed);
  std::vector<int32_t> counts(num_experts);
  for (int32_t& count : counts) {
    count = engine() % 3 == 0 ? 0 : static_cast<int32_t>(engine() % (most + 1));
  }
  return counts;
}

}  // namespace

TEST(a_tile_has_128_rows_of_one_expert) {
  const std::vector<Tile> expected = {{0, 0, 128}, {0, 128, 130}, {2, 130, 131}};
  CHECK_EQUAL(tiles_of({0, 130, 130, 131}, 200), expected);
}

TEST(every_executed_row_is_in_one_tile) {
  for (const int64_t num_experts : {1, 7, 511, 512, 513, 1025, 4096}) {
    for (const uint32_t most : {1u, 128u, 700u}) {
      const Offsets offsets = offsets_of(random_counts(num_experts, most, 3));
      CHECK(tiles_of(offsets, offsets.back() + 5) == expected_tiles(offsets));
    }
  }
}

TEST(one_expert_may_have_every_row) {
  for (const size_t expert : {0, 5, 600}) {
    std::vector<int32_t> counts(700);
    counts[expert] = 300001;
    const Offsets offsets = offsets_of(counts);
    CHECK(tiles_of(offsets, 300001) == expected_tiles(offsets));
  }
}

TEST(no_rows_are_no_tiles) {
  CHECK(tiles_of({0, 0, 0}, 0).empty());
  CHECK(tiles_of({0, 0, 0}, 1000).empty());
}

TEST(most_row_tiles_is_reached_and_never_exceeded) {
  for (const int64_t num_experts : {1, 2, 5, 40}) {
    for (const int64_t num_rows : {0, 1, 2, 4, 127, 128, 129, 256, 1000, 5120}) {
      // The worst case: as many experts as possible have one row, the last one has the others.
      std::vector<int32_t> counts(num_experts);
      int64_t left = num_rows;
      for (int32_t& count : counts) count = left > 0 ? (--left, 1) : 0;
      counts.back() += static_cast<int32_t>(left);
      CHECK_EQUAL(static_cast<int64_t>(expected_tiles(offsets_of(counts)).size()),
                  most_row_tiles(num_rows, num_experts));
    }
    for (uint32_t seed = 0; seed < 200; ++seed) {
      const Offsets offsets = offsets_of(random_counts(num_experts, 1 + 7 * seed, seed));
      CHECK(static_cast<int64_t>(expected_tiles(offsets).size()) <=
            most_row_tiles(offsets.back(), num_experts));
    }
  }
}

TEST(wrong_offsets_give_no_tile_outside_the_rows) {
  constexpr int32_t kLow = -2147483647 - 1, kHigh = 2147483647;
  Offsets overlapping(41);  // every second expert claims all rows
  for (size_t i = 1; i < overlapping.size(); i += 2) overlapping[i] = 400;
  for (const Offsets& offsets :
       {overlapping, Offsets{0, 9999, 9999}, Offsets{-5, 300, 100, 400},
        Offsets{kLow, kHigh, kLow, kHigh}, Offsets{400, 0, 400, 0, 400, 0, 400},
        Offsets{0, kHigh, 0, kHigh, 0, kHigh}}) {
    for (const Tile& tile : tiles_of(offsets, 400)) {
      CHECK(0 <= tile.begin && tile.begin < tile.end && tile.end <= 400);
      CHECK(tile.end - tile.begin <= fomoe::cuda::kTileRows);
      CHECK(0 <= tile.expert && tile.expert + 1 < static_cast<int32_t>(offsets.size()));
    }
  }
}

TEST(rows_past_the_end_become_zero_and_the_others_stay) {
  for (const int64_t row_bytes : {2, 6, 8, 12, 16, 1504, 4096}) {
    for (const int64_t offset : {0, 2, 8}) {
      for (const int32_t executed : {-3, 0, 1, 6, 7, 99}) {
        const on_device::Vector<int32_t> offsets(Offsets{0, 0, executed});
        const on_device::Memory rows(7 * row_bytes, offset);
        fomoe::cuda::zero_rows_past_end(offsets.data(), 2, 7, row_bytes, rows.data(), nullptr);
        on_device::synchronize();
        std::vector<char> bytes(rows.bytes());
        on_device::copy_from(bytes.data(), rows.data(), rows.bytes());
        for (int64_t i = 0; i < rows.bytes(); ++i) {
          CHECK(bytes[i] == (i / row_bytes >= executed ? 0 : static_cast<char>(0xFF)));
        }
      }
    }
  }
}

TEST(arrays_without_rows_or_columns_have_no_rows_past_the_end) {
  const on_device::Vector<int32_t> offsets(Offsets{0, 0});
  fomoe::cuda::zero_rows_past_end(offsets.data(), 1, 0, 64, nullptr, nullptr);
  fomoe::cuda::zero_rows_past_end(offsets.data(), 1, 4, 0, nullptr, nullptr);
}
