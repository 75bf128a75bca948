// SPDX-License-Identifier: Apache-2.0
#include "counters.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <unordered_map>

namespace fomoe::emulation {

/// What one lane did.
struct AccessRecord {
  int warp;
  Access access;
  const void* site;
  uint64_t turn;  // n-th access of this lane at this site, counted anew after each meeting point
  int lane;
  uintptr_t address;
  int64_t bytes;

  auto request() const { return std::tie(warp, access, site, turn); }
};

struct AccessLog {
  std::vector<AccessRecord> records;
  std::unordered_map<uint64_t, uint64_t> next_turn;  // by thread, access and site
  uint64_t bulk_accesses = 0;
};

namespace {

constexpr uintptr_t kSectorBytes = 32, kBankBytes = 4, kBanks = 32;

using Lanes = std::vector<AccessRecord>::const_iterator;

/// Passes through the banks that the lanes of one request need, and the fewest possible: lanes are
/// served 128 bytes at a time, and a bank gives one of its words per pass, to any number of lanes.
BankUse bank_use(Lanes first, Lanes last) {
  const auto width = std::max<int64_t>(first->bytes, kBankBytes);
  const auto lanes_at_a_time = static_cast<int>(128 / width);
  BankUse use{1, 0, 0};
  for (int begin = 0; begin < 32; begin += lanes_at_a_time) {
    std::vector<uintptr_t> words[kBanks];
    for (Lanes lane = first; lane != last; ++lane) {
      if (lane->lane < begin || lane->lane >= begin + lanes_at_a_time) continue;
      for (uintptr_t at = lane->address; at < lane->address + lane->bytes; at += kBankBytes) {
        auto& bank = words[at / kBankBytes % kBanks];
        if (std::ranges::find(bank, at / kBankBytes) == bank.end()) bank.push_back(at / kBankBytes);
      }
    }
    const auto passes = static_cast<int64_t>(
        std::ranges::max(words, {}, [](const auto& bank) { return bank.size(); }).size());
    use.wavefronts += passes;
    use.conflicts += std::max<int64_t>(passes - 1, 0);
  }
  return use;
}

void add(BankUse& total, const BankUse& use) {
  total.requests += use.requests;
  total.wavefronts += use.wavefronts;
  total.conflicts += use.conflicts;
}

std::mutex mutex;
Counters* totals = nullptr;

}  // namespace

struct Recorder {
  /// Adds the request of these lanes.
  static void add_request(KernelCounts& counts, Lanes first, Lanes last) {
    switch (first->access) {
      case Access::kSharedLoad:
        return add(counts.shared_loads, bank_use(first, last));
      case Access::kSharedStore:
        return add(counts.shared_stores, bank_use(first, last));
      default:
        break;
    }
    std::vector<std::pair<uintptr_t, uintptr_t>> touched;
    for (Lanes lane = first; lane != last; ++lane) {
      touched.emplace_back(lane->address, lane->address + lane->bytes);
    }
    std::ranges::sort(touched);
    auto& pieces = first->access == Access::kGlobalLoad ? counts.loads_ : counts.stores_;
    const int64_t request = counts.requests_++;
    const size_t first_piece = pieces.size();
    for (const auto& [begin, end] : touched) {
      if (pieces.size() > first_piece && begin <= pieces.back().end) {
        pieces.back().end = std::max(pieces.back().end, end);
      } else {
        pieces.push_back({begin, end, request});
      }
    }
  }
};

Traffic KernelCounts::sum(const std::vector<Piece>& pieces, uintptr_t begin, uintptr_t end) {
  Traffic result;
  std::vector<std::pair<uintptr_t, uintptr_t>> touched;
  int64_t last_request = -1;
  uintptr_t next_sector = 0;  // of the same request; its pieces ascend
  for (const Piece& piece : pieces) {
    const uintptr_t from = std::max(piece.begin, begin), to = std::min(piece.end, end);
    if (from >= to) continue;
    if (piece.request != last_request) {
      ++result.requests;
      next_sector = 0;
    }
    last_request = piece.request;
    const uintptr_t sector = std::max(from / kSectorBytes, next_sector);
    next_sector = (to - 1) / kSectorBytes + 1;
    result.sectors += static_cast<int64_t>(next_sector - sector);
    result.bytes += static_cast<int64_t>(to - from);
    touched.emplace_back(from, to);
  }
  std::ranges::sort(touched);
  uintptr_t next_byte = 0;
  next_sector = 0;
  for (const auto& [from, to] : touched) {
    const uintptr_t byte = std::max(from, next_byte);
    const uintptr_t sector = std::max(from / kSectorBytes, next_sector);
    next_byte = std::max(to, next_byte);
    next_sector = std::max((to - 1) / kSectorBytes + 1, next_sector);
    result.distinct_bytes += static_cast<int64_t>(next_byte - std::min(byte, next_byte));
    result.distinct_sectors += static_cast<int64_t>(next_sector - std::min(sector, next_sector));
  }
  return result;
}

Traffic KernelCounts::loads() const { return sum(loads_, 0, UINTPTR_MAX); }
Traffic KernelCounts::stores() const { return sum(stores_, 0, UINTPTR_MAX); }
Traffic KernelCounts::loads(const void* array, int64_t bytes) const {
  const auto begin = reinterpret_cast<uintptr_t>(array);
  return sum(loads_, begin, begin + bytes);
}
Traffic KernelCounts::stores(const void* array, int64_t bytes) const {
  const auto begin = reinterpret_cast<uintptr_t>(array);
  return sum(stores_, begin, begin + bytes);
}

void detail::record(Access access, const void* address, int64_t bytes, const void* site) {
  if (bytes <= 0) return;
  Block& b = block();
  if (!b.accesses) b.accesses = std::make_shared<AccessLog>();
  const Fiber& self = fiber();
  uint64_t turn = b.accesses->bulk_accesses;
  if (site == nullptr) {
    ++b.accesses->bulk_accesses;
  } else {
    const auto key = static_cast<uint64_t>(self.thread) << 50 |
                     static_cast<uint64_t>(access) << 48 |
                     reinterpret_cast<uintptr_t>(site);  // a user's address has 47 bits
    uint64_t& next = b.accesses->next_turn[key];
    next = std::max(next, self.meetings << 32) + 1;
    turn = next;
  }
  b.accesses->records.push_back({self.thread / 32, access, site, turn, self.lane,
                                 reinterpret_cast<uintptr_t>(address), bytes});
}

void finish_counting(Block& b) {
  const std::shared_ptr<AccessLog> log = std::move(b.accesses);
  b.accesses = nullptr;
  if (!is_counting) return;
  const std::lock_guard lock(mutex);
  KernelCounts& counts = (*totals)[b.kernel];
  counts.launches += b.block_index.x == 0;
  ++counts.blocks;
  counts.threads = std::max(counts.threads, static_cast<int>(b.block_size.x));
  counts.shared_bytes = std::max(counts.shared_bytes, b.shared_bytes);
  if (!log) return;
  std::ranges::stable_sort(log->records, {}, [](const AccessRecord& r) { return r.request(); });
  for (Lanes first = log->records.begin(); first != log->records.end();) {
    const Lanes last = std::find_if(first, Lanes(log->records.end()), [&](const AccessRecord& r) {
      return r.request() != first->request();
    });
    Recorder::add_request(counts, first, last);
    first = last;
  }
}

Counters count(const std::function<void()>& run) {
  if (is_counting) throw std::logic_error("a count is already under way");
  Counters result;
  totals = &result;
  is_counting = true;
  try {
    run();
  } catch (...) {
    is_counting = false;
    throw;
  }
  is_counting = false;
  return result;
}

}  // namespace fomoe::emulation
