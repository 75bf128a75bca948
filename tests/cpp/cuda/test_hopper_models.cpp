// SPDX-License-Identifier: Apache-2.0
// What the models of mbarrier, TMA and wgmma find out about wrong kernels. Every mistake is planted
// in a kernel that passes without it.
#include <string>

#include "harness.h"

#include "cuda_emulation.h"

#include "cuda/tma.cuh"
#include "cuda/wgmma.cuh"

namespace {

using namespace fomoe::cuda;
using fomoe::BFloat16;
using fomoe::DType;

struct Shared {
  BFloat16 a[64 * 64];
  BFloat16 b[128 * 64];
  Mbarrier full, empty;
};

/// What is wrong with the kernel, or "nothing".
template <typename Kernel>
std::string defect(const Kernel& kernel, int threads = 128) {
  try {
    fomoe::emulation::launch("kernel", 1, threads, sizeof(Shared), kernel);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "nothing";
}

#define CHECK_CONTAINS(text, part) CHECK((text).find(part) != std::string::npos)

/// 2-byte numbers where TMA may read them.
struct alignas(16) Global {
  BFloat16 a[64][64], b[128][64];

  Global() {
    for (int i = 0; i < 64 * 64; ++i) a[i / 64][i % 64] = number(i % 7 - 3);
    for (int i = 0; i < 128 * 64; ++i) b[i / 64][i % 64] = number(i % 5 - 2);
  }
  static BFloat16 number(int value) {
    return fomoe::from_accumulate<BFloat16>(static_cast<float>(value));
  }
  TensorMap map_a(int rows = 64) const {
    return make_tensor_map(DType::kBFloat16, a, {{64, 1, 64}, {rows, 64, 64}});
  }
  TensorMap map_b() const {
    return make_tensor_map(DType::kBFloat16, b, {{64, 1, 64}, {128, 64, 128}});
  }
};

const Global& global() {
  static const Global instance;
  return instance;
}

constexpr int kBytesA = 64 * 128, kBytesB = 128 * 128;

void init_barriers(Shared& shared) {
  if (threadIdx.x == 0) {
    init(shared.full, 1);
    init(shared.empty, 4);
    fence_barrier_init();
  }
  __syncthreads();
}

void load(Shared& shared, int expected = kBytesA + kBytesB) {
  if (threadIdx.x == 0) {
    arrive_and_expect(shared.full, expected);
    tma_load(shared.a, global().map_a(), shared.full, 0, 0);
    tma_load(shared.b, global().map_b(), shared.full, 0, 0);
  }
}

void multiply(Shared& shared, float (&sums)[64], int steps = 4) {
  const uint64_t a = wgmma_descriptor<Major::kK>(wgmma_address(shared.a), 0);
  const uint64_t b = wgmma_descriptor<Major::kK>(wgmma_address(shared.b), 0);
  for (int k = 0; k < steps; ++k) {
    wgmma<BFloat16, Major::kK, Major::kK>(sums, a + 2 * k, b + 2 * k, k > 0);
  }
  wgmma_commit();
}

void check_sums(const float (&sums)[64]) {
  const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4, col = t % 4 * 2;
  for (int i = 0; i < 64; ++i) {
    float expected = 0;
    for (int k = 0; k < 64; ++k) {
      expected += to_accumulate(global().a[row + i % 4 / 2 * 8][k]) *
                  to_accumulate(global().b[i / 4 * 8 + col + i % 2][k]);
    }
    if (sums[i] != expected) fomoe::emulation::fail("wrong value");
  }
}

enum class Mistake {
  kNone,
  kFewerBytes,
  kMoreBytes,
  kNoFullWait,
  kParity,
  kNoFence,
  kWriteAfterFence,
  kReadBeforeWait,
  kWriteBeforeWait,
};

/// One product of 64 x 128 x 64, operands by TMA.
std::string product_defect(Mistake mistake) {
  return defect([=] {
    auto& shared = dynamic_shared<Shared>();
    init_barriers(shared);
    load(shared, kBytesA + kBytesB + (mistake == Mistake::kMoreBytes) * 16 -
                     (mistake == Mistake::kFewerBytes) * 16);
    if (mistake != Mistake::kNoFullWait) wait(shared.full, mistake == Mistake::kParity);
    float sums[64] = {};
    if (mistake != Mistake::kNoFence) wgmma_fence(sums);
    if (mistake == Mistake::kWriteAfterFence) sums[3] = 1;
    multiply(shared, sums);
    if (mistake == Mistake::kReadBeforeWait) check_sums(sums);
    if (mistake == Mistake::kWriteBeforeWait) sums[3] = 1;
    wgmma_wait<0>();
    wait(shared.full, 0);
    check_sums(sums);
  });
}

}  // namespace

TEST(multiplies_what_tma_has_loaded) { CHECK_EQUAL(product_defect(Mistake::kNone), "nothing"); }

TEST(a_barrier_expects_exactly_the_bytes_that_come) {
  CHECK_CONTAINS(product_defect(Mistake::kMoreBytes), "16 bytes more announced than arrived");
  CHECK_CONTAINS(product_defect(Mistake::kFewerBytes), "more bytes come than");
}

TEST(a_load_that_is_not_waited_for_is_reported) {
  // As one that has yet to land, or as one that overwrites what a wgmma reads.
  CHECK(product_defect(Mistake::kNoFullWait) != "nothing");
  CHECK(product_defect(Mistake::kParity) != "nothing");
}

TEST(accumulators_belong_to_wgmma_from_the_fence_to_the_wait) {
  CHECK_CONTAINS(product_defect(Mistake::kNoFence), "without wgmma.fence");
  CHECK_CONTAINS(product_defect(Mistake::kWriteAfterFence), "without wgmma.fence");
  CHECK_CONTAINS(product_defect(Mistake::kReadBeforeWait), "wrong value");
  CHECK_CONTAINS(product_defect(Mistake::kWriteBeforeWait), "is written before the wgmma");
}

TEST(a_barrier_takes_no_more_arrivals_than_its_count) {
  const auto arrive_by = [](unsigned threads) {
    return defect([=] {
      auto& shared = dynamic_shared<Shared>();
      init_barriers(shared);
      if (threadIdx.x < threads) arrive(shared.full);
      wait(shared.full, 0);
    });
  };
  CHECK_EQUAL(arrive_by(1), "nothing");
  // Two end two phases: the wait for the first comes too late.
  CHECK_CONTAINS(arrive_by(2), "deadlock");
  const auto expect_twice = [](bool twice) {
    return defect([=] {
      auto& shared = dynamic_shared<Shared>();
      init_barriers(shared);
      if (threadIdx.x == 0) {
        arrive_and_expect(shared.full, kBytesA);
        if (twice) arrive(shared.full);
        tma_load(shared.a, global().map_a(), shared.full, 0, 0);
      }
      wait(shared.full, 0);
    });
  };
  CHECK_EQUAL(expect_twice(false), "nothing");
  CHECK_CONTAINS(expect_twice(true), "more arrivals in a phase than its count");
}

TEST(a_barrier_is_initialised_before_it_is_used) {
  CHECK_CONTAINS(defect([] { wait(dynamic_shared<Shared>().full, 1); }), "before mbarrier.init");
}

TEST(a_box_is_aligned_and_counts_in_full_where_it_leaves_the_array) {
  const auto load_at = [](int offset, int expected) {
    return defect([=] {
      auto& shared = dynamic_shared<Shared>();
      init_barriers(shared);
      if (threadIdx.x == 0) {
        arrive_and_expect(shared.full, expected);
        tma_load(shared.a + offset, global().map_a(40), shared.full, 0, 0);
      }
      wait(shared.full, 0);
      if (shared.a[39 * 64].bits == 0xFFFF || shared.a[40 * 64].bits != 0) {
        fomoe::emulation::fail("wrong value");
      }
    });
  };
  CHECK_EQUAL(load_at(0, kBytesA), "nothing");
  CHECK_CONTAINS(load_at(64, kBytesA), "not 1024-byte aligned");
  CHECK_CONTAINS(load_at(0, 40 * 128), "more bytes come than");
}

TEST(a_block_does_not_exit_while_a_load_is_under_way) {
  CHECK_CONTAINS(defect([] {
                   auto& shared = dynamic_shared<Shared>();
                   init_barriers(shared);
                   load(shared);
                 }),
                 "exits while a TMA load");
}

TEST(a_stage_is_released_only_after_the_wgmma_that_reads_it) {
  const auto run = [](bool early) {
    return defect(
        [=] {
          auto& shared = dynamic_shared<Shared>();
          init_barriers(shared);
          if (threadIdx.x < 128) {
            load(shared);
            if (threadIdx.x == 0) {
              wait(shared.empty, 0);
              load(shared);
            }
            return;
          }
          wait(shared.full, 0);
          float sums[64] = {};
          wgmma_fence(sums);
          multiply(shared, sums);
          if (early && threadIdx.x % 32 == 0) arrive(shared.empty);
          wgmma_wait<0>();
          if (!early && threadIdx.x % 32 == 0) arrive(shared.empty);
          wait(shared.full, 1);
        },
        256);
  };
  CHECK_EQUAL(run(false), "nothing");
  CHECK_CONTAINS(run(true), "stage released early");
}

TEST(wgmma_sees_ordinary_writes_and_asynchronous_copies_after_a_proxy_fence) {
  const auto run = [](bool copies, bool fences) {
    return defect([=] {
      auto& shared = dynamic_shared<Shared>();
      if (threadIdx.x == 0) init(shared.full, 128);
      __syncthreads();
      for (int i = threadIdx.x; i < (64 + 128) * 8; i += 128) {
        const int line = i / 8, piece = i % 8;
        auto* to = reinterpret_cast<char*>(shared.a) + line * 128 + ((piece ^ line % 8) << 4);
        const void* from =
            line < 64 ? &global().a[line][piece * 8] : &global().b[line - 64][piece * 8];
        if (copies) {
          cp_async_16(to, from);
        } else {
          store_shared(reinterpret_cast<Packet<16>*>(to), *static_cast<const Packet<16>*>(from));
        }
      }
      arrive_after_copies(shared.full);
      wait(shared.full, 0);
      if (fences) fence_async_proxy();
      float sums[64] = {};
      wgmma_fence(sums);
      multiply(shared, sums);
      wgmma_wait<0>();
      check_sums(sums);
    });
  };
  for (const bool copies : {false, true}) {
    CHECK_EQUAL(run(copies, true), "nothing");
    CHECK_CONTAINS(run(copies, false), "without fence.proxy.async");
  }
}

TEST(the_buffer_of_a_bulk_store_is_fenced_and_waited_for) {
  const auto run = [](bool fences, bool waits) {
    alignas(16) static BFloat16 target[64][64];
    return defect([=] {
      auto& shared = dynamic_shared<Shared>();
      const TensorMap map =
          make_tensor_map(DType::kBFloat16, target, {{64, 1, 64}, {1, 64, 1}, {60, 64, 64}});
      for (int turn = 0; turn < 2; ++turn) {
        for (int i = threadIdx.x; i < 64 * 64; i += 128) {
          store_shared(&shared.a[i], Global::number(turn + 1));
        }
        if (fences) fence_async_proxy();
        __syncthreads();
        if (threadIdx.x == 0) {
          tma_store(map, shared.a, 0, 0, 0);
          tma_commit();
          if (waits) tma_wait_read<0>();
        }
        __syncthreads();
      }
      if (threadIdx.x == 0 && to_accumulate(target[59][63]) != 2) {
        fomoe::emulation::fail("wrong value");
      }
    });
  };
  CHECK_EQUAL(run(true, true), "nothing");
  CHECK_CONTAINS(run(false, true), "without fence.proxy.async");
  CHECK_CONTAINS(run(true, false), "a bulk store may still read");
}

TEST(both_operands_may_lie_with_their_rows_or_columns_in_lines) {
  // The bytes of a [m][k] and b [n][k], n = 64, taken as [k][m] and [k][n] too.
  const auto run = [](auto a_major, auto b_major) {
    return defect([=] {
      constexpr Major kA = decltype(a_major)::value, kB = decltype(b_major)::value;
      auto& shared = dynamic_shared<Shared>();
      init_barriers(shared);
      load(shared);
      wait(shared.full, 0);
      float sums[64] = {};
      wgmma_fence(sums);
      const uint64_t a = wgmma_descriptor<kA>(wgmma_address(shared.a), kBytesA);
      const uint64_t b = wgmma_descriptor<kB>(wgmma_address(shared.b), kBytesA);
      for (int k = 0; k < 4; ++k) {
        wgmma<BFloat16, kA, kB>(sums, a + k * kStepBytes<kA> / 16, b + k * kStepBytes<kB> / 16,
                                true);
      }
      wgmma_commit();
      wgmma_wait<0>();
      const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4, col = t % 4 * 2;
      for (int i = 0; i < 64; ++i) {
        const int m = row + i % 4 / 2 * 8, n = i / 4 * 8 + col + i % 2;
        float expected = 0;
        for (int k = 0; k < 64; ++k) {
          const BFloat16 left = kA == Major::kK ? global().a[m][k] : global().a[k][m];
          const BFloat16 right =
              kB == Major::kK ? global().b[n][k] : global().b[n / 64 * 64 + k][n % 64];
          expected += to_accumulate(left) * to_accumulate(right);
        }
        if (sums[i] != expected) fomoe::emulation::fail("wrong value");
      }
    });
  };
  using K = std::integral_constant<Major, Major::kK>;
  using MN = std::integral_constant<Major, Major::kMN>;
  CHECK_EQUAL(run(K{}, K{}), "nothing");
  CHECK_EQUAL(run(K{}, MN{}), "nothing");
  CHECK_EQUAL(run(MN{}, K{}), "nothing");
  CHECK_EQUAL(run(MN{}, MN{}), "nothing");
}
