// SPDX-License-Identifier: Apache-2.0
// NCCL's functions that fomoe calls, between threads of one process, over host memory. Like the
// real one with non-blocking communicators: set-up is under way until all ranks have come, the
// communicator of a split appears only then, and data arrives when both ends are there.
#include "fake_nccl/fake_nccl.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "comm/nccl/library.h"
#include "fake_nccl/stream.h"

using fomoe::comm::nccl::Communicator;
using fomoe::comm::nccl::Config;
using fomoe::comm::nccl::kInProgress;
using fomoe::comm::nccl::kInt64;
using fomoe::comm::nccl::kSuccess;
using fomoe::comm::nccl::Result;
using fomoe::comm::nccl::UniqueId;
using Bytes = std::vector<char>;

namespace {

constexpr Result kInvalidArgument = 4;

std::mutex mutex;  // of all state but that of streams
std::atomic<int> num_communicators{0}, num_aborted{0};
int healthy_rank = -1;
Result reported = kSuccess, group_result = kSuccess;

struct Member {
  int world_rank, color, key;
};

/// What the ranks of one communicator share.
struct Group {
  int size = 0;
  int arrived = 0;
  int finalized = 0;
  std::map<std::pair<int, int>, std::deque<Bytes>> mail;        // by sender and receiver
  std::map<int, std::vector<Member>> splits;                    // by their number
  std::map<std::pair<int, int>, std::shared_ptr<Group>> parts;  // by number and color
  std::map<int, std::map<int, Bytes>> gathered;                 // by their number, by rank
};

std::map<std::string, std::shared_ptr<Group>>& worlds() {
  static std::map<std::string, std::shared_ptr<Group>> all;
  return all;
}

struct Pending {
  fake::StreamOfWork* stream;
  fake::Work work;
};

thread_local std::vector<Pending> grouped;
thread_local bool is_grouping = false;

Result enqueue(fomoe::comm::nccl::Stream stream, fake::Work work) {
  auto* const target = static_cast<fake::StreamOfWork*>(stream);
  if (is_grouping) {
    grouped.push_back({target, std::move(work)});
  } else {
    target->enqueue(std::move(work));
  }
  return kSuccess;
}

}  // namespace

struct ncclComm {
  std::shared_ptr<Group> group;
  int rank = 0;
  int world_rank = 0;
  int num_splits = 0;
  int num_gathers = 0;
  Communicator* split_result = nullptr;  // where the split under way puts its communicator
  int split_color = 0;
  bool is_finalizing = false;
  std::shared_ptr<std::atomic<bool>> is_aborted = std::make_shared<std::atomic<bool>>(false);
};

namespace {

Communicator created(std::shared_ptr<Group> group, int rank, int world_rank) {
  auto* const communicator = new ncclComm;
  communicator->group = std::move(group);
  communicator->rank = rank;
  communicator->world_rank = world_rank;
  ++communicator->group->arrived;
  ++num_communicators;
  return communicator;
}

/// Makes the communicator of the split under way if all ranks have come.
void finish_split(Communicator parent) {
  const int number = parent->num_splits - 1;
  const std::vector<Member>& members = parent->group->splits[number];
  if (static_cast<int>(members.size()) < parent->group->size) return;
  Communicator* const result = parent->split_result;
  parent->split_result = nullptr;
  *result = nullptr;
  if (parent->split_color < 0) return;
  int size = 0, rank = 0;
  int key = 0;
  for (const Member& member : members) {
    if (member.world_rank == parent->world_rank) key = member.key;
  }
  for (const Member& member : members) {
    if (member.color != parent->split_color) continue;
    ++size;
    rank += member.key < key;
  }
  std::shared_ptr<Group>& part = parent->group->parts[{number, parent->split_color}];
  if (!part) part = std::make_shared<Group>();
  part->size = size;
  *result = created(part, rank, parent->world_rank);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void fake_nccl_report_error(int world_rank, int result) {
  const std::lock_guard lock(mutex);
  healthy_rank = world_rank;
  reported = result;
}

EXPORTED void fake_nccl_refuse_groups(int result) {
  const std::lock_guard lock(mutex);
  group_result = result;
}

EXPORTED int fake_nccl_num_communicators() { return num_communicators; }

EXPORTED int fake_nccl_num_aborted() { return num_aborted; }

EXPORTED Result ncclGetVersion(int* version) {
  *version = 22809;
  return kSuccess;
}

EXPORTED const char* ncclGetErrorString(Result result) {
  return result == 6 ? "remote process exited or there was a network error" : "invalid argument";
}

EXPORTED const char* ncclGetLastError(Communicator) { return "fake detail"; }

EXPORTED Result ncclGetUniqueId(UniqueId* id) {
  static std::atomic<int> next{1};
  *id = {};
  std::snprintf(id->bytes, sizeof(id->bytes), "world %d", next++);
  return kSuccess;
}

EXPORTED Result ncclCommInitRankConfig(Communicator* result, int size, UniqueId id, int rank,
                                       Config* config) {
  if (config->magic != 0xcafebeef || config->blocking != 0) return kInvalidArgument;
  const std::lock_guard lock(mutex);
  std::shared_ptr<Group>& group = worlds()[std::string(id.bytes, sizeof(id.bytes))];
  if (!group) group = std::make_shared<Group>();
  group->size = size;
  *result = created(group, rank, rank);
  return kInProgress;
}

EXPORTED Result ncclCommSplit(Communicator parent, int color, int key, Communicator* result,
                              Config* config) {
  if (config->magic != 0xcafebeef || config->blocking != 0) return kInvalidArgument;
  const std::lock_guard lock(mutex);
  parent->group->splits[parent->num_splits++].push_back({parent->world_rank, color, key});
  parent->split_result = result;
  parent->split_color = color;
  return kInProgress;
}

EXPORTED Result ncclCommGetAsyncError(Communicator communicator, Result* state) {
  const std::lock_guard lock(mutex);
  const Group& group = *communicator->group;
  if (communicator->split_result) finish_split(communicator);
  const bool is_waiting = group.arrived < group.size || communicator->split_result ||
                          (communicator->is_finalizing && group.finalized < group.size);
  *state = is_waiting ? kInProgress : kSuccess;
  if (reported != kSuccess && communicator->world_rank != healthy_rank) *state = reported;
  return kSuccess;
}

EXPORTED Result ncclCommFinalize(Communicator communicator) {
  const std::lock_guard lock(mutex);
  communicator->is_finalizing = true;
  ++communicator->group->finalized;
  return kInProgress;
}

EXPORTED Result ncclCommDestroy(Communicator communicator) {
  const std::lock_guard lock(mutex);
  delete communicator;
  --num_communicators;
  return kSuccess;
}

EXPORTED Result ncclCommAbort(Communicator communicator) {
  *communicator->is_aborted = true;
  ++num_aborted;
  return ncclCommDestroy(communicator);
}

EXPORTED Result ncclGroupStart() {
  is_grouping = true;
  return kSuccess;
}

EXPORTED Result ncclGroupEnd() {
  is_grouping = false;
  const std::vector<Pending> pending = std::exchange(grouped, {});
  {
    const std::lock_guard lock(mutex);
    if (group_result != kSuccess) return group_result;
  }
  // The members of a group go on side by side: one that waits does not keep back the others.
  if (pending.empty()) return kSuccess;
  auto left = std::make_shared<std::vector<fake::Work>>();
  for (const Pending& each : pending) left->push_back(each.work);
  pending.front().stream->enqueue([left] {
    std::erase_if(*left, [](const fake::Work& work) { return work(); });
    return left->empty();
  });
  return kInProgress;
}

EXPORTED Result ncclSend(const void* data, size_t count, int, int peer, Communicator communicator,
                         fomoe::comm::nccl::Stream stream) {
  return enqueue(stream, [=, group = communicator->group, rank = communicator->rank] {
    const auto* bytes = static_cast<const char*>(data);
    const std::lock_guard lock(mutex);
    group->mail[{rank, peer}].emplace_back(bytes, bytes + count);
    return true;
  });
}

EXPORTED Result ncclRecv(void* data, size_t count, int, int peer, Communicator communicator,
                         fomoe::comm::nccl::Stream stream) {
  return enqueue(stream, [=, group = communicator->group, rank = communicator->rank,
                          is_aborted = communicator->is_aborted] {
    if (*is_aborted) return true;
    const std::lock_guard lock(mutex);
    std::deque<Bytes>& mail = group->mail[{peer, rank}];
    if (mail.empty()) return false;
    if (mail.front().size() != count) return false;  // a mismatch hangs, as in NCCL
    std::memcpy(data, mail.front().data(), count);
    mail.pop_front();
    return true;
  });
}

EXPORTED Result ncclAllGather(const void* mine, void* all, size_t count, int type,
                              Communicator communicator, fomoe::comm::nccl::Stream stream) {
  if (type != kInt64) return kInvalidArgument;
  const size_t bytes = count * 8;
  const int number = communicator->num_gathers++;
  auto has_given = std::make_shared<bool>(false);
  return enqueue(stream, [=, group = communicator->group, rank = communicator->rank,
                          is_aborted = communicator->is_aborted] {
    if (*is_aborted) return true;
    const std::lock_guard lock(mutex);
    std::map<int, Bytes>& given = group->gathered[number];
    if (!*has_given)
      given[rank] = Bytes(static_cast<const char*>(mine), static_cast<const char*>(mine) + bytes);
    *has_given = true;
    if (static_cast<int>(given.size()) < group->size) return false;
    for (const auto& [from, values] : given) {
      std::memcpy(static_cast<char*>(all) + static_cast<size_t>(from) * bytes, values.data(),
                  bytes);
    }
    return true;
  });
}
