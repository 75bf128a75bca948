// SPDX-License-Identifier: Apache-2.0
// What a kernel's accesses would cost on a GPU: bytes, 32-byte sectors, bank conflicts.
//
// The lanes of a warp whose accesses come from the same instruction (the same call in the source,
// for the n-th time since the last barrier or collective of the whole warp) are one request, as on
// the hardware. Lanes that skip a turn of a loop without any such meeting point are put together
// with later turns of the others; so much this model does not know. Atomics, and accesses that go
// around memory.cuh, are not counted.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "block.h"

namespace fomoe::emulation {

enum class Access : uint8_t { kGlobalLoad, kGlobalStore, kSharedLoad, kSharedStore };

/// Traffic between a kernel and global memory, in one direction.
struct Traffic {
  int64_t requests = 0;
  int64_t bytes = 0;    // that the requests touch; what several lanes of one request touch is one
  int64_t sectors = 0;  // of 32 bytes, that the requests touch
  int64_t distinct_bytes = 0;  // that were touched at all; as many as `bytes` if each only once
  int64_t distinct_sectors = 0;
};

/// Accesses to shared memory, in one direction.
struct BankUse {
  int64_t requests = 0;
  int64_t wavefronts = 0;  // passes through the banks
  int64_t conflicts = 0;   // passes more than with all banks evenly used
};

/// One kernel's launches, added up.
class KernelCounts {
 public:
  int64_t launches = 0, blocks = 0;
  int threads = 0;           // per block, of the largest launch
  int64_t shared_bytes = 0;  // per block, dynamic, of the largest launch
  BankUse shared_loads, shared_stores;

  /// All loads, or those from the `bytes` bytes at `array`.
  Traffic loads() const;
  Traffic loads(const void* array, int64_t bytes) const;
  Traffic stores() const;
  Traffic stores(const void* array, int64_t bytes) const;

 private:
  friend struct Recorder;
  /// A piece of memory that a request touches.
  struct Piece {
    uintptr_t begin, end;
    int64_t request;
  };
  static Traffic sum(const std::vector<Piece>& pieces, uintptr_t begin, uintptr_t end);

  int64_t requests_ = 0;
  std::vector<Piece> loads_, stores_;
};

/// By the kernel's name in LaunchShape.
using Counters = std::map<std::string, KernelCounts>;

/// Runs something that launches kernels and counts what they do. One count at a time.
Counters count(const std::function<void()>& run);

inline std::atomic<bool> is_counting{false};

namespace detail {
void record(Access access, const void* address, int64_t bytes, const void* site);
}

/// One lane's access; `site` tells which instruction it is. Throws if the address is not a multiple
/// of the size, as a GPU would.
inline void note_access(Access access, const void* address, int64_t bytes, const void* site) {
  const auto size = static_cast<uint64_t>(bytes);
  if (std::has_single_bit(size) && reinterpret_cast<uintptr_t>(address) % size != 0) {
    fail("an access of " + std::to_string(bytes) + " bytes at an address that is not a multiple");
  }
  if (is_counting) detail::record(access, address, bytes, site);
}

/// A copy of any number of bytes to or from global memory that one thread starts: a request of its
/// own. Its use of the banks is not counted.
inline void note_bulk_access(Access access, const void* address, int64_t bytes) {
  if (is_counting) detail::record(access, address, bytes, nullptr);
}

/// Adds a finished block to the totals.
void finish_counting(Block& block);

}  // namespace fomoe::emulation
