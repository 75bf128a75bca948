// SPDX-License-Identifier: Apache-2.0
// Blocks of fibers and their scheduler.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace fomoe::emulation {

/// What multiprocessor_count() says: few, so that persistent kernels loop.
inline constexpr int kMultiprocessors = 3;

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

enum class FiberState : uint8_t { kReady, kAtBarrier, kInWarpCollective, kPolling, kDone };

struct Warp;
struct AccessLog;

/// One CUDA thread.
struct Fiber {
  Index3 thread_index;
  int thread = 0;  // in the block
  int lane = 0;
  Warp* warp = nullptr;
  FiberState state = FiberState::kReady;
  int barrier = 0;        // the one waited for
  uint64_t meetings = 0;  // barriers and collectives of the whole warp passed so far
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  /// Copies issued with cp.async and not yet grouped, and the groups that are not yet waited for.
  std::vector<std::function<void()>> pending_copies;
  std::vector<std::vector<std::function<void()>>> copy_groups;
  /// State of the models of other asynchronous instructions, which make it when first used.
  std::shared_ptr<void> asynchronous;
};

/// The meeting point of a warp's collective instructions.
struct Warp {
  uint32_t members = 0, arrived = 0, exited = 0;
  uint32_t masks[32] = {}, participants[32] = {};  // of each lane's collective
  std::array<uint64_t, 2> inputs[32] = {}, outputs[32] = {};
  Fiber* lanes[32] = {};
};

struct Barrier {
  int arrived = 0;
  int expected = 0;  // 0: all threads that have not exited
};

struct Block {
  const char* kernel = "";
  Index3 block_index, block_size, grid_size;
  char* shared = nullptr;
  int64_t shared_bytes = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[16];
  int alive = 0;
  uint64_t progress = 0;  // changes when anything happened that a waiting fiber may wait for
  std::exception_ptr error;
  void* scheduler_stack_pointer = nullptr;
  const std::function<void()>* body = nullptr;
  uint64_t random = 0;
  /// Asynchronous effects, each with the number of scheduler rounds until it takes place.
  std::vector<std::pair<int, std::function<void()>>> deferred;
  std::shared_ptr<AccessLog> accesses;  // while counting
  /// State of instruction models that belongs to the block.
  std::shared_ptr<void> asynchronous;
};

/// The block and the thread that are running. Fibers never move to another thread of the operating
/// system; not inlined, so that no compiler keeps a thread-local address across a switch.
Block& block();
Fiber& fiber();

/// Throws with the kernel, the block and the thread in front.
[[noreturn]] void fail(const std::string& what);

/// Gives way to the other fibers; returns when the scheduler comes back to this one.
void wait_as(FiberState state);

/// Waits until `count` threads (0: all that are alive) arrived at barrier `id` of the block.
void barrier_sync(int id, int count);
void barrier_arrive(int id, int count);

/// A number that differs from call to call and with EMULATION_SEED.
uint64_t random_number();

/// Lets something happen later, after a random number of scheduler rounds.
void defer(std::function<void()> effect);

/// Runs body once per thread. Throws what a thread threw, or what is wrong with the kernel.
void launch(const char* kernel, int64_t blocks, int threads, int64_t shared_bytes,
            const std::function<void()>& body);

}  // namespace fomoe::emulation
