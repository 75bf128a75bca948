// SPDX-License-Identifier: Apache-2.0
// The emulation's counts, against access patterns worked out by hand.
#include <string>
#include <vector>

#include "harness.h"

#include "cuda_emulation.h"

#include "cuda/device.cuh"
#include "cuda/memory.cuh"

namespace {

using namespace fomoe::cuda;
using fomoe::emulation::BankUse;
using fomoe::emulation::Counters;
using fomoe::emulation::KernelCounts;
using fomoe::emulation::Traffic;

constexpr int64_t kSharedBytes = 16 * 1024;

/// 4 KiB that begin at a multiple of 128 bytes.
alignas(128) float memory[1024];

/// What one block of one warp does.
template <typename Body>
KernelCounts one_warp(const Body& body) {
  return fomoe::emulation::count(
             [&] { fomoe::emulation::launch("kernel", 1, 32, kSharedBytes, body); })
      .at("kernel");
}

std::string describe(const Traffic& t) {
  return std::to_string(t.requests) + " requests, " + std::to_string(t.bytes) + " bytes, " +
         std::to_string(t.sectors) + " sectors, distinct: " + std::to_string(t.distinct_bytes) +
         " bytes, " + std::to_string(t.distinct_sectors) + " sectors";
}

std::string describe(const BankUse& use) {
  return std::to_string(use.requests) + " requests, " + std::to_string(use.wavefronts) +
         " wavefronts, " + std::to_string(use.conflicts) + " conflicts";
}

/// The loads of one warp whose lanes read Words at these indices.
template <typename Word, typename IndexOf>
std::string loads(const IndexOf& index_of) {
  const KernelCounts counts = one_warp([&] {
    load_global(reinterpret_cast<const Word*>(memory) + index_of(static_cast<int>(threadIdx.x)));
  });
  return describe(counts.loads());
}

/// The same for shared memory.
template <typename Word, typename IndexOf>
std::string shared_loads(const IndexOf& index_of) {
  const KernelCounts counts = one_warp([&] {
    auto* words = &dynamic_shared<Word>();
    load_shared(words + index_of(static_cast<int>(threadIdx.x)));
  });
  return describe(counts.shared_loads);
}

}  // namespace

TEST(coalesced_lanes_share_sectors) {
  CHECK_EQUAL(loads<float>([](int lane) { return lane; }),
              "1 requests, 128 bytes, 4 sectors, distinct: 128 bytes, 4 sectors");
  CHECK_EQUAL(loads<Packet<16>>([](int lane) { return lane; }),
              "1 requests, 512 bytes, 16 sectors, distinct: 512 bytes, 16 sectors");
}

TEST(lanes_that_start_within_a_sector_touch_one_more) {
  CHECK_EQUAL(loads<float>([](int lane) { return lane + 1; }),
              "1 requests, 128 bytes, 5 sectors, distinct: 128 bytes, 5 sectors");
}

TEST(strided_lanes_touch_a_sector_each) {
  CHECK_EQUAL(loads<float>([](int lane) { return 8 * lane; }),
              "1 requests, 128 bytes, 32 sectors, distinct: 128 bytes, 32 sectors");
}

TEST(a_broadcast_moves_one_word) {
  CHECK_EQUAL(loads<float>([](int) { return 3; }),
              "1 requests, 4 bytes, 1 sectors, distinct: 4 bytes, 1 sectors");
}

TEST(what_two_requests_touch_is_counted_twice_but_distinct_once) {
  const KernelCounts counts = one_warp([] {
    for (int pass = 0; pass < 2; ++pass) load_global(memory + threadIdx.x);
  });
  CHECK_EQUAL(describe(counts.loads()),
              "2 requests, 256 bytes, 8 sectors, distinct: 128 bytes, 4 sectors");
}

TEST(two_instructions_are_two_requests) {
  const KernelCounts counts = one_warp([] {
    if (threadIdx.x < 16) {
      load_global(reinterpret_cast<const Packet<8>*>(memory) + threadIdx.x);
    } else {
      load_global(memory + threadIdx.x);
    }
  });
  CHECK_EQUAL(describe(counts.loads()),
              "2 requests, 192 bytes, 6 sectors, distinct: 128 bytes, 4 sectors");
}

TEST(lanes_that_stay_out_of_a_loop_early_leave_the_others_together) {
  const KernelCounts counts = one_warp([] {
    for (int i = static_cast<int>(threadIdx.x); i < 40; i += 32) load_global(memory + i);
  });
  CHECK_EQUAL(describe(counts.loads()),
              "2 requests, 160 bytes, 5 sectors, distinct: 160 bytes, 5 sectors");
}

TEST(lanes_are_together_again_after_a_barrier) {
  const auto alternating = [](bool meet) {
    return describe(one_warp([=] {
                      for (unsigned row = 0; row < 2; ++row) {
                        if (threadIdx.x % 2 == row) load_global(memory + threadIdx.x);
                        if (meet) __syncwarp();
                      }
                    }).loads());
  };
  CHECK_EQUAL(alternating(true),
              "2 requests, 128 bytes, 8 sectors, distinct: 128 bytes, 4 sectors");
  CHECK_EQUAL(alternating(false),
              "1 requests, 128 bytes, 4 sectors, distinct: 128 bytes, 4 sectors");
}

TEST(warps_and_blocks_make_requests_of_their_own) {
  const Counters counters = fomoe::emulation::count([] {
    fomoe::emulation::launch("kernel", 3, 64, 0, [] { store_global(memory + threadIdx.x, 0.0f); });
  });
  const KernelCounts& counts = counters.at("kernel");
  CHECK_EQUAL(describe(counts.stores()),
              "6 requests, 768 bytes, 24 sectors, distinct: 256 bytes, 8 sectors");
  CHECK_EQUAL(counts.loads().requests, 0);
  CHECK_EQUAL(counts.launches, 1);
  CHECK_EQUAL(counts.blocks, 3);
  CHECK_EQUAL(counts.threads, 64);
}

TEST(the_traffic_of_one_array_is_told_from_the_rest) {
  const KernelCounts counts = one_warp([] { load_global(memory + 4 * threadIdx.x); });
  CHECK_EQUAL(describe(counts.loads(memory + 16, 64)),
              "1 requests, 16 bytes, 2 sectors, distinct: 16 bytes, 2 sectors");
  CHECK_EQUAL(counts.loads(memory + 1, 12).bytes, 0);
}

TEST(kernels_are_counted_by_name) {
  const Counters counters = fomoe::emulation::count([] {
    fomoe::emulation::launch("one", 1, 32, 0, [] { load_global(memory); });
    fomoe::emulation::launch("other", 1, 32, 0, [] { store_global(memory, 0.0f); });
    fomoe::emulation::launch("one", 1, 32, 0, [] { load_global(memory + 8); });
  });
  CHECK_EQUAL(counters.size(), 2u);
  CHECK_EQUAL(counters.at("one").launches, 2);
  CHECK_EQUAL(counters.at("one").loads().bytes, 8);
  CHECK_EQUAL(counters.at("other").stores().bytes, 4);
}

TEST(nothing_is_counted_outside_of_a_count) {
  fomoe::emulation::launch("kernel", 1, 32, 0, [] { load_global(memory); });
  CHECK(fomoe::emulation::count([] {}).empty());
}

TEST(every_bank_once_is_no_conflict) {
  CHECK_EQUAL(shared_loads<float>([](int lane) { return lane; }),
              "1 requests, 1 wavefronts, 0 conflicts");
  CHECK_EQUAL(shared_loads<float>([](int lane) { return lane * 33 % 1024; }),
              "1 requests, 1 wavefronts, 0 conflicts");
}

TEST(the_same_word_for_all_lanes_is_no_conflict) {
  CHECK_EQUAL(shared_loads<float>([](int) { return 5; }), "1 requests, 1 wavefronts, 0 conflicts");
  // Two lanes share each word of 4 bytes.
  CHECK_EQUAL(shared_loads<uint16_t>([](int lane) { return lane; }),
              "1 requests, 1 wavefronts, 0 conflicts");
}

TEST(two_words_of_one_bank_are_a_conflict) {
  CHECK_EQUAL(shared_loads<float>([](int lane) { return 2 * lane; }),
              "1 requests, 2 wavefronts, 1 conflicts");
  CHECK_EQUAL(shared_loads<float>([](int lane) { return 32 * lane; }),
              "1 requests, 32 wavefronts, 31 conflicts");
}

TEST(wide_words_are_served_by_half_and_quarter_warps) {
  CHECK_EQUAL(shared_loads<Packet<8>>([](int lane) { return lane; }),
              "1 requests, 2 wavefronts, 0 conflicts");
  CHECK_EQUAL(shared_loads<Packet<16>>([](int lane) { return lane; }),
              "1 requests, 4 wavefronts, 0 conflicts");
  // Rows of 128 bytes: the 8 lanes of a quarter all want the first 4 banks.
  CHECK_EQUAL(shared_loads<Packet<16>>([](int lane) { return 8 * lane; }),
              "1 requests, 32 wavefronts, 28 conflicts");
  // The swizzle of 16-byte chunks that spreads them.
  CHECK_EQUAL(shared_loads<Packet<16>>([](int lane) { return 8 * lane + lane % 8; }),
              "1 requests, 4 wavefronts, 0 conflicts");
}

TEST(asynchronous_copies_count_on_both_sides) {
  const KernelCounts counts = one_warp([] {
    auto* target = &dynamic_shared<Packet<16>>();
    cp_async_16(target + threadIdx.x, memory + 4 * threadIdx.x, threadIdx.x < 16 ? 16 : 0);
    cp_async_commit();
    cp_async_wait<0>();
  });
  CHECK_EQUAL(describe(counts.loads()),
              "1 requests, 256 bytes, 8 sectors, distinct: 256 bytes, 8 sectors");
  CHECK_EQUAL(describe(counts.shared_stores), "1 requests, 4 wavefronts, 0 conflicts");
}

TEST(a_bulk_copy_is_a_request_of_its_own) {
  const KernelCounts counts = one_warp([] {
    if (threadIdx.x < 2) {
      fomoe::emulation::note_bulk_access(fomoe::emulation::Access::kGlobalLoad, memory, 200);
    }
  });
  CHECK_EQUAL(describe(counts.loads()),
              "2 requests, 400 bytes, 14 sectors, distinct: 200 bytes, 7 sectors");
}

TEST(a_misaligned_access_is_reported) {
  try {
    one_warp([] {
      const auto* bytes = reinterpret_cast<const unsigned char*>(memory);
      load_global(reinterpret_cast<const Packet<16>*>(bytes + 8));
    });
  } catch (const std::exception& error) {
    CHECK(std::string(error.what()).find("16 bytes at an address that is not a multiple") !=
          std::string::npos);
    CHECK(!fomoe::emulation::is_counting);
    return;
  }
  CHECK(false);
}
