// SPDX-License-Identifier: Apache-2.0
#include "comm/loopback/loopback.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>

namespace fomoe::comm {
namespace {

/// What a member brings to a call.
struct Post {
  const void* send;
  const int64_t* send_bytes;  // [members]
};

int64_t sum_before(const int64_t* bytes, int64_t index) {
  return std::accumulate(bytes, bytes + index, int64_t{0});
}

}  // namespace

/// Where the members of a group meet, call by call.
class Loopback::World {
 public:
  explicit World(std::chrono::milliseconds timeout) : timeout_(timeout) {}

  /// Waits until every member has posted, calls copy(posts), waits until every member has copied.
  void meet(const std::string& stage, const std::vector<int>& members, int rank, const Post& post,
            const std::function<void(const std::vector<Post>&)>& copy) {
    std::unique_lock lock(mutex_);
    Meeting& meeting = meetings_[{stage, members.front()}];
    meeting.posts.resize(members.size());
    meeting.is_here.resize(members.size());
    const size_t index = std::find(members.begin(), members.end(), rank) - members.begin();
    meeting.posts[index] = post;
    wait_for_all(lock, meeting, stage, members, index);
    try {
      copy(meeting.posts);
    } catch (const CommunicationError&) {
      fail(rank, "it has failed");
      throw;
    }
    wait_for_all(lock, meeting, stage, members, index);
  }

  void abort(int rank) {
    const std::lock_guard lock(mutex_);
    fail(rank, "it has aborted");
  }

 private:
  struct Meeting {
    std::vector<Post> posts;    // [members]
    std::vector<bool> is_here;  // [members]
    int64_t num_here = 0, generation = 0;
  };

  void wait_for_all(std::unique_lock<std::mutex>& lock, Meeting& meeting, const std::string& stage,
                    const std::vector<int>& members, size_t index) {
    const int64_t generation = meeting.generation;
    meeting.is_here[index] = true;
    if (++meeting.num_here == static_cast<int64_t>(members.size())) {
      meeting.num_here = 0;
      meeting.is_here.assign(members.size(), false);
      ++meeting.generation;
      changed_.notify_all();
    }
    const bool is_in_time = changed_.wait_for(
        lock, timeout_, [&] { return failed_rank_ >= 0 || meeting.generation != generation; });
    if (!is_in_time) {
      const auto missing = std::find(meeting.is_here.begin(), meeting.is_here.end(), false);
      fail(members[missing - meeting.is_here.begin()],
           "it did not take part within " + std::to_string(timeout_.count()) + " ms");
    }
    // Also when all are here: buffers of a rank that has failed may be gone.
    if (failed_rank_ >= 0) {
      throw CommunicationError(stage, members[index], failed_rank_, reason_);
    }
  }

  /// Only the first failure is reported: the others follow from it.
  void fail(int rank, const std::string& reason) {
    if (failed_rank_ >= 0) return;
    failed_rank_ = rank;
    reason_ = reason;
    changed_.notify_all();
  }

  const std::chrono::milliseconds timeout_;
  std::mutex mutex_;  // of all below, and held by those who copy
  std::condition_variable changed_;
  std::map<std::pair<std::string, int>, Meeting> meetings_;  // by stage and first member
  int failed_rank_ = -1;
  std::string reason_;
};

class Loopback::End : public Transport {
 public:
  End(World& world, const Topology& topology, int rank)
      : world_(world),
        rank_(rank),
        everyone_(topology.num_ranks()),
        intra_node_(topology.intra_node_group(rank)),
        inter_site_(topology.inter_site_group(rank)) {
    std::iota(everyone_.begin(), everyone_.end(), 0);
  }

  int rank() const override { return rank_; }
  int world_size() const override { return static_cast<int>(everyone_.size()); }
  std::span<const int> group(Stage stage) const override { return members(stage); }
  void abort() override { world_.abort(rank_); }

  void gather_counts(const int64_t* mine, int64_t count, int64_t* all) override {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(int64_t));
    const std::vector<int64_t> send_bytes(everyone_.size(), bytes);
    world_.meet("counts", everyone_, rank_, {mine, send_bytes.data()},
                [&](const std::vector<Post>& posts) {
                  for (size_t peer = 0; peer < posts.size(); ++peer) {
                    check("counts", static_cast<int>(peer), posts[peer].send_bytes[rank_], bytes);
                    if (bytes > 0) std::memcpy(all + peer * count, posts[peer].send, bytes);
                  }
                });
  }

  void all_to_all(Stage stage, const void* send, const int64_t* send_bytes, void* receive,
                  const int64_t* receive_bytes, cuda::Stream) override {
    const std::vector<int>& group = members(stage);
    const size_t own = std::find(group.begin(), group.end(), rank_) - group.begin();
    world_.meet(
        name_of(stage), group, rank_, {send, send_bytes}, [&](const std::vector<Post>& posts) {
          auto* target = static_cast<char*>(receive);
          for (size_t i = 0; i < group.size(); ++i) {
            const int64_t bytes = receive_bytes[i];
            check(name_of(stage), group[i], posts[i].send_bytes[own], bytes);
            if (bytes == 0) continue;
            std::memcpy(
                target,
                static_cast<const char*>(posts[i].send) + sum_before(posts[i].send_bytes, own),
                bytes);
            target += bytes;
          }
        });
  }

 private:
  const std::vector<int>& members(Stage stage) const {
    return stage == Stage::intra_node ? intra_node_ : inter_site_;
  }

  void check(const char* stage, int peer, int64_t sent, int64_t expected) const {
    if (sent == expected) return;
    throw CommunicationError(
        stage, rank_, peer,
        "expected " + std::to_string(expected) + " bytes, it sends " + std::to_string(sent));
  }

  World& world_;
  const int rank_;
  std::vector<int> everyone_, intra_node_, inter_site_;
};

Loopback::Loopback(const Topology& topology, std::chrono::milliseconds timeout)
    : world_(std::make_unique<World>(timeout)) {
  for (int rank = 0; rank < topology.num_ranks(); ++rank) {
    ends_.push_back(std::make_unique<End>(*world_, topology, rank));
  }
}

Loopback::~Loopback() = default;

Transport& Loopback::end(int rank) { return *ends_[rank]; }

}  // namespace fomoe::comm
