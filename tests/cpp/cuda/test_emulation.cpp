// SPDX-License-Identifier: Apache-2.0
// What the emulation finds out about wrong kernels.
#include <string>

#include "harness.h"

#include "cuda_emulation.h"

#include "cuda/device.cuh"
#include "cuda/memory.cuh"

namespace {

using namespace fomoe::cuda;

/// What is wrong with the kernel, or "nothing".
template <typename Kernel>
std::string defect(const Kernel& kernel, int threads = 64, int64_t shared_bytes = 1024) {
  try {
    fomoe::emulation::launch("kernel", 2, threads, shared_bytes, kernel);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "nothing";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

struct Shared {
  float values[64];
};

}  // namespace

TEST(threads_exchange_values_through_shared_memory) {
  CHECK_EQUAL(defect([] {
                auto& shared = dynamic_shared<Shared>();
                shared.values[threadIdx.x] = static_cast<float>(threadIdx.x);
                __syncthreads();
                if (shared.values[63 - threadIdx.x] != 63.0f - threadIdx.x) {
                  fomoe::emulation::fail("wrong value");
                }
              }),
              "nothing");
}

TEST(a_missing_barrier_gives_wrong_values) {
  CHECK(contains(defect([] {
                   auto& shared = dynamic_shared<Shared>();
                   shared.values[threadIdx.x] = static_cast<float>(threadIdx.x);
                   if (shared.values[63 - threadIdx.x] != 63.0f - threadIdx.x) {
                     fomoe::emulation::fail("wrong value");
                   }
                 }),
                 "wrong value"));
}

TEST(a_barrier_that_some_threads_miss_is_a_deadlock) {
  CHECK(contains(defect([] {
                   if (threadIdx.x < 32) fomoe::emulation::barrier_sync(1, 64);
                   if (threadIdx.x >= 32) fomoe::emulation::barrier_sync(2, 64);
                 }),
                 "deadlock: 64 threads at a barrier"));
}

TEST(lanes_that_disagree_about_the_mask_are_reported) {
  // As different masks, or as a deadlock of the lanes that wait for the others.
  CHECK(defect([] {
          if (threadIdx.x < 16) {
            __syncwarp(0xffffffffu);
          } else {
            __shfl_sync(0xffff0000u, 1, 16);
          }
        }) != "nothing");
}

TEST(shuffles_votes_and_reductions_follow_the_lanes) {
  CHECK_EQUAL(defect([] {
                const int lane = threadIdx.x % 32;
                const bool ok =
                    __shfl_xor_sync(kAllLanes, lane, 5) == (lane ^ 5) &&
                    __shfl_up_sync(kAllLanes, lane, 1) == (lane ? lane - 1 : 0) &&
                    __ballot_sync(kAllLanes, lane < 3) == 7u &&
                    __match_any_sync(kAllLanes, lane / 16) == (lane < 16 ? 0xffffu : 0xffff0000u) &&
                    __reduce_max_sync(kAllLanes, lane) == 31;
                if (!ok) fomoe::emulation::fail("wrong value");
              }),
              "nothing");
}

TEST(an_asynchronous_copy_is_not_there_before_it_is_waited_for) {
  alignas(16) static const float source[4] = {1, 2, 3, 4};
  const auto copy = [](bool waits) {
    auto& shared = dynamic_shared<Shared>();
    if (threadIdx.x == 0) {
      cp_async_16(shared.values, source, 8);
      cp_async_commit();
      if (waits) cp_async_wait<0>();
      if (shared.values[1] != 2 || shared.values[2] != 0) fomoe::emulation::fail("wrong value");
    }
  };
  CHECK_EQUAL(defect([&] { copy(true); }), "nothing");
  CHECK(contains(defect([&] { copy(false); }), "wrong value"));
}

TEST(launches_beyond_the_limits_of_a_gpu_are_refused) {
  CHECK(contains(defect([] {}, 1025), "no GPU launches 2 blocks of 1025 threads"));
  CHECK(contains(defect([] {}, 64, 228 * 1024), "with 233472 bytes of shared memory"));
  CHECK_EQUAL(defect([] {}, 1024, 227 * 1024), "nothing");
}
