// SPDX-License-Identifier: Apache-2.0
#include "comm/nccl/transport.h"

#include <algorithm>
#include <numeric>
#include <sstream>
#include <utility>

#include "comm/topology.h"

namespace fomoe::comm::nccl {
namespace {

constexpr const char* kSetup = "setup";
constexpr const char* kCounts = "counts";
constexpr auto kPause = std::chrono::microseconds(50);      // of a caller that waits
constexpr auto kWatchPause = std::chrono::milliseconds(5);  // of the thread that watches

}  // namespace

NcclTransport::NcclTransport(std::shared_ptr<const Library> library, std::unique_ptr<Device> device,
                             World world)
    : library_(std::move(library)), device_(std::move(device)), world_(std::move(world)) {
  const Topology topology(world_.ranks_per_site, {});
  world_size_ = topology.num_ranks();
  if (world_.rank < 0 || world_.rank >= world_size_) {
    throw std::invalid_argument("rank: expected one of the " + std::to_string(world_size_) +
                                " ranks of ranks_per_site, got " + std::to_string(world_.rank));
  }
  part(Stage::intra_node).members = topology.intra_node_group(world_.rank);
  part(Stage::inter_site).members = topology.inter_site_group(world_.rank);
  Lock lock(mutex_);
  connect(lock);
  // A std::function, for a thread's own type would be exported under the name of ours.
  watcher_ = std::thread(std::function<void()>([this] { watch(); }));
}

NcclTransport::~NcclTransport() {
  {
    Lock lock(mutex_);
    try {
      drain(lock);
      finalize(lock);
    } catch (
        const std::exception&) {  // it has been aborted, and the caller has no use for a reason
    }
    closing_ = true;
  }
  wake_.notify_all();
  watcher_.join();
}

void NcclTransport::connect(Lock& lock) {
  front_since_ = Clock::now();
  Config config;
  const Result result =
      library_->comm_init_rank_config(&all_, world_size_, world_.id, world_.rank, &config);
  require(kSetup, result, all_);
  settle(lock, kSetup, all_);
  split(lock, part(Stage::intra_node));
  split(lock, part(Stage::inter_site));
}

/// Collective over the world: also ranks that get no communicator take part.
void NcclTransport::split(Lock& lock, Part& part) {
  Config config;
  const int color = part.members.size() > 1 ? part.members.front() : kNoColor;
  require(kSetup, library_->comm_split(all_, color, world_.rank, &part.communicator, &config),
          all_);
  settle(lock, kSetup, all_);  // only then is the new communicator there
  if (part.communicator) settle(lock, kSetup, part.communicator);
}

void NcclTransport::gather_counts(const int64_t* mine, int64_t count, int64_t* all) {
  Lock lock(mutex_);
  drain(lock);  // larger scratch memory must not wait for a device that waits for others
  const int64_t bytes = count * static_cast<int64_t>(sizeof(int64_t));
  const int64_t all_bytes = bytes * world_size_;
  const Device::Scratch scratch = device_->scratch(bytes + all_bytes);
  char* const host = static_cast<char*>(scratch.host);
  char* const device = static_cast<char*>(scratch.device);
  const Stream stream = device_->stream();
  std::copy_n(mine, count, reinterpret_cast<int64_t*>(host));
  const auto begin = [&] {
    device_->copy(device, host, bytes, stream);
    return library_->all_gather(device, device + bytes, static_cast<size_t>(count), kInt64, all_,
                                stream);
  };
  const auto end = [&] { device_->copy(host + bytes, device + bytes, all_bytes, stream); };
  run(lock, kCounts, stream, all_, begin, end);
  drain(lock);
  std::copy_n(reinterpret_cast<const int64_t*>(host) + count, count * world_size_, all);
}

void NcclTransport::all_to_all(Stage stage, const void* send, const int64_t* send_bytes,
                               void* receive, const int64_t* receive_bytes, Stream stream) {
  Lock lock(mutex_);
  throw_if_failed();
  const Part& group = part(stage);
  const auto begin = [&] {
    return exchange(group, static_cast<const char*>(send), send_bytes, static_cast<char*>(receive),
                    receive_bytes, stream);
  };
  run(lock, name_of(stage), stream, group.communicator, begin, [] {});
}

/// One grouped call for all members. Nothing is sent where a count is 0, and nothing expected
/// there: the two ranks of a pair know the same number.
Result NcclTransport::exchange(const Part& part, const char* send, const int64_t* send_bytes,
                               char* receive, const int64_t* receive_bytes, Stream stream) {
  Result first_error = kSuccess;  // a group must be ended, also after an error
  const auto note = [&](Result result) {
    if (first_error == kSuccess && result != kInProgress) first_error = result;
  };
  const Communicator communicator = part.communicator;
  if (communicator) note(library_->group_start());
  for (size_t member = 0; member < part.members.size(); ++member) {
    const int peer = static_cast<int>(member);
    const auto out = static_cast<size_t>(send_bytes[member]);
    const auto in = static_cast<size_t>(receive_bytes[member]);
    if (part.members[member] == world_.rank) {
      if (in > 0) device_->copy(receive, send, receive_bytes[member], stream);
    } else {
      if (out > 0) note(library_->send(send, out, kBytes, peer, communicator, stream));
      if (in > 0) note(library_->recv(receive, in, kBytes, peer, communicator, stream));
    }
    send += out;
    receive += in;
  }
  if (communicator) note(library_->group_end());
  return first_error;
}

void NcclTransport::abort() {
  Lock lock(mutex_);
  fail(under_way_.empty() ? kCounts : under_way_.front().stage, "it was aborted");
}

void NcclTransport::check() {
  Lock lock(mutex_);
  poll();
  throw_if_failed();
}

/// `begin` calls NCCL once; `end` comes behind it in the stream.
void NcclTransport::run(Lock& lock, const std::string& stage, Stream stream,
                        Communicator communicator, const std::function<Result()>& begin,
                        const std::function<void()>& end) {
  try {
    if (under_way_.empty()) {
      front_since_ = Clock::now();
    } else {
      device_->wait(stream, under_way_.back().end);
    }
    require(stage, begin(), communicator);
    if (communicator) settle(lock, stage, communicator);
    end();
    under_way_.push_back({stage, device_->record(stream)});
  } catch (const CommunicationError&) {
    throw;
  } catch (const std::exception& error) {
    fail(stage, error.what());
    throw_if_failed();
  }
  wake_.notify_all();
}

/// Waits until nothing is under way.
void NcclTransport::drain(Lock& lock) {
  for (poll(); !under_way_.empty(); poll()) {
    lock.unlock();
    std::this_thread::sleep_for(kPause);
    lock.lock();
  }
  throw_if_failed();
}

void NcclTransport::finalize(Lock& lock) {
  front_since_ = Clock::now();
  for (const Communicator communicator : communicators()) {
    require(kSetup, library_->comm_finalize(communicator), communicator);
    settle(lock, kSetup, communicator);
  }
  for (const Communicator communicator : communicators()) library_->comm_destroy(communicator);
}

/// Waits until the communicator has done, on the host, what it was last asked for.
void NcclTransport::settle(Lock& lock, const std::string& stage, Communicator communicator) {
  const Clock::time_point begin = Clock::now();
  for (;;) {
    Result state = kSuccess;
    const Result result = library_->comm_get_async_error(communicator, &state);
    require(stage, result == kSuccess ? state : result, communicator);
    if (state != kInProgress) return;
    if (Clock::now() - begin > world_.timeout) {
      fail(stage, silence());
      throw_if_failed();
    }
    lock.unlock();
    std::this_thread::sleep_for(kPause);
    lock.lock();
    throw_if_failed();
  }
}

/// Throws unless NCCL accepted the call.
void NcclTransport::require(const std::string& stage, Result result, Communicator communicator) {
  if (result == kSuccess || result == kInProgress) return;
  const char* detail = library_->get_last_error(communicator);
  std::string reason = std::string("NCCL said: ") + library_->get_error_string(result);
  if (detail && *detail) reason += std::string(" (") + detail + ")";
  fail(stage, reason);
  throw_if_failed();
}

/// Forgets what has ended; fails if NCCL found an error or the first operation takes too long.
void NcclTransport::poll() {
  if (under_way_.empty()) return;
  const std::string stage = under_way_.front().stage;
  try {
    while (!under_way_.empty() && device_->has_passed(under_way_.front().end)) {
      device_->release(under_way_.front().end);
      under_way_.pop_front();
      front_since_ = Clock::now();
    }
    for (const Communicator communicator : communicators()) {
      Result state = kSuccess;
      const Result result = library_->comm_get_async_error(communicator, &state);
      require(stage, result == kSuccess ? state : result, communicator);
    }
  } catch (const CommunicationError&) {
    return;  // it is kept
  } catch (const std::exception& error) {
    fail(stage, error.what());
    return;
  }
  if (!under_way_.empty() && Clock::now() - front_since_ > world_.timeout) {
    fail(under_way_.front().stage, silence());
  }
}

/// The thread that ends what would wait for ever.
void NcclTransport::watch() {
  Lock lock(mutex_);
  try {
    device_->make_current();
  } catch (const std::exception& error) {
    fail(kSetup, error.what());
  }
  while (!closing_) {
    if (under_way_.empty()) {
      wake_.wait(lock);
    } else {
      poll();
      wake_.wait_for(lock, kWatchPause);
    }
  }
}

/// The first failure counts. Ends what the device waits for.
void NcclTransport::fail(const std::string& stage, const std::string& reason) {
  if (failure_) return;
  failure_.emplace(stage, world_.rank, -1, reason);
  for (const Communicator communicator : communicators()) library_->comm_abort(communicator);
  all_ = nullptr;
  for (Part& part : parts_) part.communicator = nullptr;
  for (const Operation& operation : under_way_) device_->release(operation.end);
  under_way_.clear();
}

void NcclTransport::throw_if_failed() const {
  if (failure_) throw *failure_;
}

std::string NcclTransport::silence() const {
  std::ostringstream text;
  text << "the other ranks did not take part within "
       << std::chrono::duration<double>(world_.timeout).count() << " s";
  return text.str();
}

/// Those that there are, the world's last.
std::vector<Communicator> NcclTransport::communicators() const {
  std::vector<Communicator> found = {parts_[0].communicator, parts_[1].communicator, all_};
  std::erase(found, nullptr);
  return found;
}

}  // namespace fomoe::comm::nccl
