// SPDX-License-Identifier: Apache-2.0
// What a block's asynchronous instructions are about to do: the state that the models of barrier.h,
// tma.h and wgmma.h share.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <unordered_map>
#include <vector>

#include "block.h"

namespace fomoe::emulation {

/// Who may still touch each 16 bytes of the block's shared memory, and whether the asynchronous
/// proxy (TMA, wgmma) sees what they hold.
class SharedState {
 public:
  /// Bytes written by an ordinary store, stmatrix or a completed cp.async: the asynchronous proxy
  /// sees them after fence.proxy.async. Fails if an asynchronous instruction may still read them.
  void note_generic_write(const void* address, int64_t bytes);
  /// fence.proxy.async, by any thread: counts for every write before it.
  void fence_proxy();

  /// A copy that lands later. Fails if something may still read or write the bytes.
  void begin_copy(const void* address, int64_t bytes, const char* by_what);
  /// It has landed. What cp.async copied, the asynchronous proxy sees only after a fence.
  void end_copy(const void* address, int64_t bytes, bool through_generic_proxy);

  enum class Reader { kWgmma, kStore };
  /// A read that lasts until it is released. Fails if the bytes are not there, or not visible to
  /// the asynchronous proxy.
  void begin_read(Reader reader, const void* address, int64_t bytes);
  void end_read(Reader reader, const void* address, int64_t bytes);

 private:
  struct Piece {
    uint16_t wgmma_readers = 0, store_readers = 0;
    bool unfenced = false, landing = false;
  };
  void check_overwrite(size_t piece, const char* by_what) const;
  void mark_unfenced(size_t piece);
  std::pair<size_t, size_t> pieces_of(const void* address, int64_t bytes);

  std::vector<Piece> pieces_;
  std::vector<size_t> unfenced_;
};

/// An mbarrier. The current phase ends when all arrivals and all announced bytes have come.
struct MbarrierState {
  int count = 0;    // arrivals of a phase
  int pending = 0;  // still to come in this phase
  int64_t bytes = 0;
  int phase = 0;  // parity of the current phase
};

/// One thread's accumulator, an array of floats, as far as wgmma concerns it.
struct Accumulator {
  std::vector<float> values;  // at the last wgmma.fence, or computed so far
  int instructions = 0;       // that still write it
};

struct WgmmaInstruction;

/// The wgmma of a warpgroup, in program order, from the oldest that is not complete.
struct Warpgroup {
  std::deque<WgmmaInstruction> instructions;
  int64_t first = 0;  // number of the oldest
};

/// One thread's part in asynchronous instructions.
struct ThreadState {
  std::map<float*, Accumulator> accumulators;
  int64_t wgmma_issued = 0;
  std::deque<int64_t> wgmma_groups;  // the number after each group's last wgmma
  std::vector<std::function<void()>> bulk_stores;
  std::deque<std::vector<std::function<void()>>> bulk_groups;
};

struct Asynchronous {
  SharedState shared;
  std::unordered_map<const void*, MbarrierState> barriers;
  std::vector<Warpgroup> warpgroups;
  std::vector<ThreadState> threads;
  int64_t loads_under_way = 0;
};

/// Of the running block.
Asynchronous& asynchronous();
/// Of the running thread.
ThreadState& thread_state();

/// Fails if a finished block left something under way.
void finish_asynchronous(Block& block);
/// The barriers whose bytes have not come, for the report of a deadlock.
std::string describe_barriers(Block& block);

/// Address of shared memory as instructions encode it: the offset in the block's shared memory.
uint32_t shared_offset(const void* address);

/// Position of a byte in a tile with 128-byte swizzle: 16-byte piece c of line r lies at c ^ r % 8.
inline uint32_t swizzled(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

}  // namespace fomoe::emulation
