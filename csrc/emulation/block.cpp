// SPDX-License-Identifier: Apache-2.0
#include "block.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "asynchronous.h"
#include "counters.h"
#include "warp.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#error "the emulation of CUDA kernels switches stacks in x86-64 assembly"
#endif

namespace fomoe::emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMostThreads = 1024;
constexpr int64_t kMostSharedBytes = 227 * 1024;  // of sm_90; sm_80 has 163 KiB

thread_local Block* current_block = nullptr;
thread_local Fiber* current_fiber = nullptr;

/// Saves the callee-saved registers and the stack pointer, and takes up those saved at `to`.
__attribute__((naked, noinline)) void switch_stack(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

// AddressSanitizer has to know which stack is in use. A fiber's own fake stack is given up when it
// is done.
void resume(Block& block, Fiber& fiber) {
  current_fiber = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
#endif
  switch_stack(&block.scheduler_stack_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
thread_local const void* scheduler_stack;
thread_local size_t scheduler_stack_bytes;
#endif

void return_to_scheduler() {
  Fiber& self = fiber();
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(self.state == FiberState::kDone ? nullptr : &fake_stack,
                                 scheduler_stack, scheduler_stack_bytes);
#endif
  switch_stack(&self.stack_pointer, block().scheduler_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void open_if_complete(int id) {
  Block& b = block();
  Barrier& barrier = b.barriers[id];
  const int expected = barrier.expected ? barrier.expected : b.alive;
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  barrier = {};
  ++b.progress;
  for (Fiber& f : b.fibers) {
    if (f.state == FiberState::kAtBarrier && f.barrier == id) f.state = FiberState::kReady;
  }
}

void arrive(int id, int count) {
  Barrier& barrier = block().barriers[id];
  if (barrier.arrived > 0 && barrier.expected != count) {
    fail("threads expect different numbers of threads at barrier " + std::to_string(id));
  }
  ++barrier.arrived;
  barrier.expected = count;
}

void keep_error() {
  if (!block().error) block().error = std::current_exception();
}

/// Where a fiber begins.
void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  try {
    (*block().body)();
  } catch (...) {
    keep_error();
  }
  Block& b = block();
  Fiber& self = fiber();
  self.state = FiberState::kDone;
  --b.alive;
  ++b.progress;
  self.warp->exited |= 1u << self.lane;
  for (int id = 0; id < 16; ++id) open_if_complete(id);
  try {
    complete_collectives(*self.warp);
  } catch (...) {
    keep_error();
  }
  return_to_scheduler();
  std::abort();
}

/// Memory for the stacks of a block's fibers.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() {
    for (char* stack : stacks_) munmap(stack, kStackBytes);
  }
  char* get(size_t i) {
    while (stacks_.size() <= i) {
      void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      stacks_.push_back(static_cast<char*>(memory));
    }
    return stacks_[i];
  }

 private:
  std::vector<char*> stacks_;
};

/// Stacks that one launch after the other uses: to map them takes longer than to run most kernels.
class StackPool {
 public:
  std::unique_ptr<Stacks> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<Stacks>();
    std::unique_ptr<Stacks> stacks = std::move(free_.back());
    free_.pop_back();
    return stacks;
  }
  void give_back(std::unique_ptr<Stacks> stacks) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(stacks));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Stacks>> free_;
};

void prepare(Block& b, Stacks& stacks) {
  const auto threads = static_cast<int>(b.block_size.x);
  b.fibers.assign(threads, Fiber{});
  b.warps.assign((threads + 31) / 32, Warp{});
  std::fill(std::begin(b.barriers), std::end(b.barriers), Barrier{});
  b.alive = threads;
  b.deferred.clear();
  b.asynchronous.reset();
  for (int t = 0; t < threads; ++t) {
    Fiber& f = b.fibers[t];
    f.thread = t;
    f.thread_index.x = static_cast<unsigned>(t);
    f.lane = t % 32;
    f.warp = &b.warps[t / 32];
    f.warp->lanes[f.lane] = &f;
    f.warp->members |= 1u << f.lane;
    f.stack = stacks.get(t);
    auto** top = reinterpret_cast<void**>(f.stack + kStackBytes);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(&run_fiber);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    f.stack_pointer = top;
  }
}

/// Frames that never return leave their marks in AddressSanitizer's map of the stacks, which the
/// next block uses again.
void clean_stacks([[maybe_unused]] const Block& b) {
#if defined(__SANITIZE_ADDRESS__)
  for (const Fiber& f : b.fibers) {
    const auto* pointer = static_cast<const char*>(f.stack_pointer);
    __asan_unpoison_memory_region(pointer, f.stack + kStackBytes - pointer);
  }
#endif
}

void shuffle(std::vector<int>& order) {
  for (size_t i = order.size() - 1; i > 0; --i)
    std::swap(order[i], order[random_number() % (i + 1)]);
}

/// Lets the effects whose time has come take place, in a random order.
void run_deferred(Block& b) {
  std::vector<std::function<void()>> due;
  std::erase_if(b.deferred, [&](auto& entry) {
    if (entry.first-- > 0) return false;
    due.push_back(std::move(entry.second));
    return true;
  });
  current_fiber = nullptr;
  try {
    for (auto& effect : due) effect();
  } catch (...) {
    keep_error();
  }
  b.progress += due.size();
}

std::string describe_deadlock(Block& b) {
  int count[5] = {};
  for (const Fiber& f : b.fibers) ++count[static_cast<int>(f.state)];
  return "deadlock: " + std::to_string(count[1]) + " threads at a barrier, " +
         std::to_string(count[2]) + " in a warp collective, " + std::to_string(count[3]) +
         " polling, " + std::to_string(count[4]) + " exited" + describe_barriers(b);
}

void run_block(Block& b, Stacks& stacks) {
  current_block = &b;
  prepare(b, stacks);
  std::vector<int> order(b.fibers.size());
  std::iota(order.begin(), order.end(), 0);
  size_t left = order.size();
  int idle_rounds = 0;
  while (left > 0) {
    const uint64_t progress = b.progress;
    bool ran = false;
    shuffle(order);
    for (const int i : order) {
      Fiber& f = b.fibers[i];
      if (f.state != FiberState::kReady && f.state != FiberState::kPolling) continue;
      ran = ran || f.state == FiberState::kReady;
      f.state = FiberState::kReady;
      resume(b, f);
      left -= f.state == FiberState::kDone;
      if (b.error) return;
    }
    run_deferred(b);
    if (b.error) return;
    idle_rounds = ran || b.progress != progress || !b.deferred.empty() ? 0 : idle_rounds + 1;
    if (left > 0 && idle_rounds > 2) {
      current_fiber = nullptr;
      try {
        fail(describe_deadlock(b));
      } catch (...) {
        keep_error();
      }
      return;
    }
  }
  while (!b.deferred.empty()) run_deferred(b);
  try {
    finish_asynchronous(b);
  } catch (...) {
    keep_error();
  }
}

int64_t environment_number(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoll(text) : otherwise;
}

}  // namespace

__attribute__((noinline)) Block& block() { return *current_block; }
__attribute__((noinline)) Fiber& fiber() { return *current_fiber; }

void fail(const std::string& what) {
  std::string message = std::string("emulation of ") + block().kernel + ", block " +
                        std::to_string(block().block_index.x);
  if (current_fiber) message += ", thread " + std::to_string(fiber().thread);
  throw std::runtime_error(message + ": " + what);
}

void wait_as(FiberState state) {
  fiber().state = state;
  return_to_scheduler();
}

void barrier_sync(int id, int count) {
  Fiber& self = fiber();
  ++self.meetings;
  self.barrier = id;
  self.state = FiberState::kAtBarrier;
  arrive(id, count);
  open_if_complete(id);
  if (self.state == FiberState::kAtBarrier) return_to_scheduler();
}

void barrier_arrive(int id, int count) {
  arrive(id, count);
  ++block().progress;
  open_if_complete(id);
}

uint64_t random_number() {
  uint64_t& x = block().random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x * 0x2545F4914F6CDD1Dull >> 20;
}

void defer(std::function<void()> effect) {
  block().deferred.emplace_back(static_cast<int>(random_number() % 3), std::move(effect));
}

void launch(const char* kernel, int64_t blocks, int threads, int64_t shared_bytes,
            const std::function<void()>& body) {
  if (threads < 1 || threads > kMostThreads || shared_bytes > kMostSharedBytes ||
      blocks > INT32_MAX) {
    throw std::runtime_error(std::string("emulation of ") + kernel + ": no GPU launches " +
                             std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                             " threads with " + std::to_string(shared_bytes) +
                             " bytes of shared memory");
  }
  static const int64_t seed = environment_number("EMULATION_SEED", 0);
  static const int64_t most_threads =
      environment_number("EMULATION_THREADS", std::thread::hardware_concurrency());
  static std::atomic<uint64_t> launches{0};
  static StackPool pool;
  const uint64_t launch_number = ++launches;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&] {
    std::unique_ptr<Stacks> stacks = pool.take();
    Block b;
    b.kernel = kernel;
    b.body = &body;
    b.block_size.x = static_cast<unsigned>(threads);
    b.block_size.y = b.block_size.z = b.grid_size.y = b.grid_size.z = 1;
    b.grid_size.x = static_cast<unsigned>(blocks);
    // Exactly as large as asked for, so that AddressSanitizer sees an overrun.
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, shared_bytes ? shared_bytes : 1) != 0) throw std::bad_alloc();
    const std::unique_ptr<void, void (*)(void*)> owner(memory, &std::free);
    b.shared = static_cast<char*>(memory);
    b.shared_bytes = shared_bytes;
    for (int64_t i; (i = next++) < blocks;) {
      b.block_index.x = static_cast<unsigned>(i);
      b.random = ((static_cast<uint64_t>(seed) * 1000003 + launch_number) * 1000003 + i + 1) *
                     0x9E3779B97F4A7C15ull |
                 1;
      std::memset(b.shared, 0xFF, shared_bytes);  // NaN
      run_block(b, *stacks);
      clean_stacks(b);
      finish_counting(b);
      if (b.error) {
        const std::lock_guard lock(mutex);
        if (!error) error = b.error;
        next = blocks;
      }
    }
    pool.give_back(std::move(stacks));
  };
  std::vector<std::thread> workers;
  for (int64_t i = 0; i < std::min(blocks, most_threads); ++i) workers.emplace_back(work);
  for (std::thread& worker : workers) worker.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace fomoe::emulation
