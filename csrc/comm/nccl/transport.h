// SPDX-License-Identifier: Apache-2.0
// The two-stage all-to-all over NCCL.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "comm/nccl/device.h"
#include "comm/nccl/library.h"
#include "comm/transport.h"

namespace fomoe::comm::nccl {

/// What every rank of a world knows; the same everywhere but for `rank`.
struct World {
  std::vector<int> ranks_per_site;
  int rank = 0;
  UniqueId id = {};  // from one rank, see Library::get_unique_id
  std::chrono::milliseconds timeout = {};
};

/// Three communicators: the world, its split into sites, and its split into the groups of the
/// inter-site stage. A group of one rank has none: its rows are copied.
///
/// Order of collectives. On the device an operation of this transport begins when the one before
/// has ended, whatever their streams, so that every rank runs them in the order of the calls, which
/// must be the same everywhere: ncclCommInitRankConfig, the split into sites, the split into
/// inter-site groups, then one per call. Other communicators on the device (torch's, for FSDP) must
/// not run between the calls in another order on another rank.
///
/// Failure. No call waits for ever. A thread looks at what is under way: an error that NCCL found,
/// or a timeout, aborts all communicators, which also ends what the device is waiting for. The
/// error is thrown by the call under way, or by the next one: what an all_to_all received is to be
/// used only if a later call, or check(), did not throw. The timeout of an operation begins when it
/// is called and when the one before has ended, the later of the two. Peers of an aborted rank
/// learn of it from NCCL, or by their own timeouts.
class NcclTransport final : public Transport {
 public:
  /// Collective. Throws CommunicationError when the others do not come within the timeout,
  /// std::invalid_argument if sites and rank do not fit.
  NcclTransport(std::shared_ptr<const Library> library, std::unique_ptr<Device> device,
                World world);

  /// Collective: waits, within the timeout, for what is under way and for the peers to get it.
  ~NcclTransport() override;

  int rank() const override { return world_.rank; }
  int world_size() const override { return world_size_; }
  std::span<const int> group(Stage stage) const override { return part(stage).members; }
  void gather_counts(const int64_t* mine, int64_t count, int64_t* all) override;
  void all_to_all(Stage stage, const void* send, const int64_t* send_bytes, void* receive,
                  const int64_t* receive_bytes, Stream stream) override;
  void abort() override;

  /// Throws the error, if there has been one; does not wait.
  void check();

 private:
  using Clock = std::chrono::steady_clock;
  using Lock = std::unique_lock<std::mutex>;

  /// A stage's ranks and their communicator, null for one rank.
  struct Part {
    std::vector<int> members;
    Communicator communicator = nullptr;
  };

  /// An operation on the device.
  struct Operation {
    std::string stage;
    Device::Event end;
  };

  Part& part(Stage stage) { return parts_[static_cast<size_t>(stage)]; }
  const Part& part(Stage stage) const { return parts_[static_cast<size_t>(stage)]; }

  void connect(Lock& lock);
  void split(Lock& lock, Part& part);
  void run(Lock& lock, const std::string& stage, Stream stream, Communicator communicator,
           const std::function<Result()>& begin, const std::function<void()>& end);
  Result exchange(const Part& part, const char* send, const int64_t* send_bytes, char* receive,
                  const int64_t* receive_bytes, Stream stream);
  void drain(Lock& lock);
  void finalize(Lock& lock);
  void settle(Lock& lock, const std::string& stage, Communicator communicator);
  void require(const std::string& stage, Result result, Communicator communicator);
  void poll();
  void watch();
  void fail(const std::string& stage, const std::string& reason);
  void throw_if_failed() const;
  std::string silence() const;
  std::vector<Communicator> communicators() const;

  const std::shared_ptr<const Library> library_;
  const std::unique_ptr<Device> device_;
  const World world_;
  int world_size_ = 0;

  std::mutex mutex_;  // of everything below, and of all calls of NCCL
  std::condition_variable wake_;
  Communicator all_ = nullptr;
  std::array<Part, 2> parts_;
  std::deque<Operation> under_way_;
  Clock::time_point front_since_;
  std::optional<CommunicationError> failure_;
  bool closing_ = false;
  std::thread watcher_;
};

}  // namespace fomoe::comm::nccl
