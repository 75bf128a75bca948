// SPDX-License-Identifier: Apache-2.0
#include "asynchronous.h"

#include "wgmma.h"

namespace fomoe::emulation {

std::pair<size_t, size_t> SharedState::pieces_of(const void* address, int64_t bytes) {
  if (pieces_.empty()) pieces_.resize(block().shared_bytes / 16 + 1);
  const int64_t begin = static_cast<const char*>(address) - block().shared;
  if (begin < 0 || begin + bytes > block().shared_bytes) {
    fail("an asynchronous instruction leaves the block's shared memory");
  }
  return {begin / 16, (begin + bytes + 15) / 16};
}

void SharedState::check_overwrite(size_t piece, const char* by_what) const {
  const Piece& p = pieces_[piece];
  if (p.wgmma_readers > 0) {
    fail(std::string("stage released early: ") + by_what +
         " overwrites shared memory that a wgmma may still read");
  }
  if (p.store_readers > 0) {
    fail(std::string(by_what) +
         " overwrites shared memory that a bulk store may still read (wait_group.read)");
  }
  if (p.landing) fail(std::string(by_what) + " overwrites shared memory that a copy still writes");
}

void SharedState::mark_unfenced(size_t piece) {
  if (!pieces_[piece].unfenced) unfenced_.push_back(piece);
  pieces_[piece].unfenced = true;
}

void SharedState::note_generic_write(const void* address, int64_t bytes) {
  const auto [begin, end] = pieces_of(address, bytes);
  for (size_t i = begin; i < end; ++i) {
    check_overwrite(i, "a store");
    mark_unfenced(i);
  }
}

void SharedState::begin_copy(const void* address, int64_t bytes, const char* by_what) {
  const auto [begin, end] = pieces_of(address, bytes);
  for (size_t i = begin; i < end; ++i) {
    check_overwrite(i, by_what);
    pieces_[i].landing = true;
  }
}

void SharedState::end_copy(const void* address, int64_t bytes, bool through_generic_proxy) {
  const auto [begin, end] = pieces_of(address, bytes);
  for (size_t i = begin; i < end; ++i) {
    pieces_[i].landing = pieces_[i].unfenced = false;
    if (through_generic_proxy) mark_unfenced(i);
  }
}

void SharedState::fence_proxy() {
  for (const size_t i : unfenced_) pieces_[i].unfenced = false;
  unfenced_.clear();
}

void SharedState::begin_read(Reader reader, const void* address, int64_t bytes) {
  const auto [begin, end] = pieces_of(address, bytes);
  for (size_t i = begin; i < end; ++i) {
    const char* who = reader == Reader::kWgmma ? "wgmma" : "a bulk store";
    if (pieces_[i].landing) {
      fail(std::string(who) + " reads shared memory that a copy has yet to fill");
    }
    if (pieces_[i].unfenced) {
      fail(std::string(who) +
           " reads shared memory written through the generic proxy without fence.proxy.async");
    }
    ++(reader == Reader::kWgmma ? pieces_[i].wgmma_readers : pieces_[i].store_readers);
  }
}

void SharedState::end_read(Reader reader, const void* address, int64_t bytes) {
  const auto [begin, end] = pieces_of(address, bytes);
  for (size_t i = begin; i < end; ++i) {
    --(reader == Reader::kWgmma ? pieces_[i].wgmma_readers : pieces_[i].store_readers);
  }
}

Asynchronous& asynchronous() {
  Block& b = block();
  if (!b.asynchronous) {
    auto state = std::make_shared<Asynchronous>();
    state->warpgroups.resize((b.fibers.size() + 127) / 128);
    state->threads.resize(b.fibers.size());
    b.asynchronous = state;
  }
  return *static_cast<Asynchronous*>(b.asynchronous.get());
}

ThreadState& thread_state() { return asynchronous().threads[fiber().thread]; }

uint32_t shared_offset(const void* address) {
  const int64_t offset = static_cast<const char*>(address) - block().shared;
  if (offset < 0 || offset >= block().shared_bytes) fail("not an address of shared memory");
  return static_cast<uint32_t>(offset);
}

void finish_asynchronous(Block& b) {
  if (!b.asynchronous) return;
  const Asynchronous& state = asynchronous();
  if (state.loads_under_way > 0) fail("the block exits while a TMA load is under way");
  for (const ThreadState& thread : state.threads) {
    if (!thread.bulk_groups.empty() || !thread.bulk_stores.empty()) {
      fail("the block exits without waiting for its bulk stores to read (wait_group.read)");
    }
    if (!thread.wgmma_groups.empty()) fail("the block exits while a wgmma is under way");
  }
}

std::string describe_barriers(Block& b) {
  std::string text;
  if (!b.asynchronous) return text;
  for (const auto& [address, barrier] : asynchronous().barriers) {
    if (barrier.bytes == 0) continue;
    text += "; the mbarrier at " + std::to_string(shared_offset(address)) + " has " +
            std::to_string(barrier.bytes) + " bytes more announced than arrived, and waits for " +
            std::to_string(barrier.pending) + " arrivals";
  }
  return text;
}

}  // namespace fomoe::emulation
