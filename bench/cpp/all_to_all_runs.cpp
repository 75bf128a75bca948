// SPDX-License-Identifier: Apache-2.0
#include "all_to_all_runs.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>

#include "comm/loopback/loopback.h"

namespace bench {
namespace {

using namespace fomoe::comm;
using Clock = std::chrono::steady_clock;
using Exchange = std::function<Exchanged(int rank, Transport&)>;

constexpr auto kPause = std::chrono::microseconds(20);

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

void require_result(int64_t rank, bool is_right) {
  if (!is_right) {
    throw std::runtime_error("rank " + std::to_string(rank) + " has a wrong result");
  }
}

void require_bytes(int64_t sent, int64_t planned) {
  if (sent != planned) {
    throw std::runtime_error("sent " + std::to_string(sent) + " bytes, planned " +
                             std::to_string(planned));
  }
}

Exchange two_stages(const AllToAllCase& all_to_all) {
  return [&](int rank, Transport& transport) {
    return exchange_hierarchical(all_to_all.topology, all_to_all.plans[rank],
                                 all_to_all.tokens[rank], transport);
  };
}

Exchange flat(const AllToAllCase& all_to_all) {
  return [&](int rank, Transport& transport) {
    return exchange_flat(all_to_all.topology, all_to_all.tokens[rank], transport);
  };
}

double run_threads(Loopback& loopback, const Exchange& exchange, const AllToAllCase& all_to_all,
                   int64_t planned_bytes) {
  const size_t num_ranks = all_to_all.tokens.size();
  std::vector<Exchanged> results(num_ranks);
  std::vector<std::string> errors(num_ranks);
  std::vector<std::thread> threads;
  const Clock::time_point begin = Clock::now();
  for (size_t rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      Transport& transport = loopback.end(static_cast<int>(rank));
      try {
        results[rank] = exchange(static_cast<int>(rank), transport);
      } catch (const std::exception& error) {
        errors[rank] = error.what();
        transport.abort();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const double seconds = seconds_since(begin);
  int64_t sent = 0;
  for (size_t rank = 0; rank < num_ranks; ++rank) {
    if (!errors[rank].empty()) throw std::runtime_error(errors[rank]);
    require_result(static_cast<int64_t>(rank), results[rank].y == all_to_all.expected[rank]);
    sent += results[rank].sent_bytes;
  }
  require_bytes(sent, planned_bytes);
  return seconds;
}

/// NCCL for rows in host memory: every call copies them to the device and back.
class StagedTransport final : public Transport {
 public:
  StagedTransport(nccl::NcclTransport& transport, nccl::Device& device)
      : transport_(transport), device_(device) {}

  int rank() const override { return transport_.rank(); }
  int world_size() const override { return transport_.world_size(); }
  std::span<const int> group(Stage stage) const override { return transport_.group(stage); }
  void gather_counts(const int64_t* mine, int64_t count, int64_t* all) override {
    transport_.gather_counts(mine, count, all);
  }

  void all_to_all(Stage stage, const void* send, const int64_t* send_bytes, void* receive,
                  const int64_t* receive_bytes, fomoe::cuda::Stream) override {
    const size_t members = group(stage).size();
    const int64_t out = std::accumulate(send_bytes, send_bytes + members, int64_t{0});
    const int64_t in = std::accumulate(receive_bytes, receive_bytes + members, int64_t{0});
    const nccl::Device::Scratch scratch = device_.scratch(out + in);
    char* const host = static_cast<char*>(scratch.host);
    char* const on_device = static_cast<char*>(scratch.device);
    const nccl::Stream stream = device_.stream();
    if (out > 0) {
      std::memcpy(host, send, static_cast<size_t>(out));
      device_.copy(on_device, host, out, stream);
    }
    transport_.all_to_all(stage, on_device, send_bytes, on_device + out, receive_bytes, stream);
    if (in > 0) device_.copy(host + out, on_device + out, in, stream);
    const nccl::Device::Event end = device_.record(stream);
    while (!device_.has_passed(end)) {
      transport_.check();
      std::this_thread::sleep_for(kPause);
    }
    device_.release(end);
    if (in > 0) std::memcpy(receive, host + out, static_cast<size_t>(in));
  }

  void abort() override { transport_.abort(); }

 private:
  nccl::NcclTransport& transport_;
  nccl::Device& device_;
};

double run_rank(StagedTransport& transport, const Exchange& exchange,
                const AllToAllCase& all_to_all, int64_t planned_bytes) {
  constexpr int64_t kNumbers = 3;
  const int rank = transport.rank();
  std::vector<int64_t> everyones(kNumbers * transport.world_size());
  const auto gather = [&](int64_t nanoseconds, int64_t sent, bool is_right) {
    const int64_t mine[kNumbers] = {nanoseconds, sent, is_right};
    transport.gather_counts(mine, kNumbers, everyones.data());
  };
  gather(0, 0, true);  // so that all begin together
  const Clock::time_point begin = Clock::now();
  const Exchanged result = exchange(rank, transport);
  const double seconds = seconds_since(begin);
  gather(static_cast<int64_t>(1e9 * seconds), result.sent_bytes,
         result.y == all_to_all.expected[rank]);
  int64_t slowest = 0, sent = 0;
  for (int64_t r = 0; r < transport.world_size(); ++r) {
    slowest = std::max(slowest, everyones[kNumbers * r]);
    sent += everyones[kNumbers * r + 1];
    require_result(r, everyones[kNumbers * r + 2] == 1);  // all ranks say it
  }
  require_bytes(sent, planned_bytes);
  return 1e-9 * static_cast<double>(slowest);
}

}  // namespace

AllToAllSeconds run_over_loopback(const AllToAllCase& all_to_all, int64_t repeats) {
  Loopback sites(all_to_all.topology, std::chrono::minutes(1));
  Loopback world(all_to_all.one_site, std::chrono::minutes(1));
  AllToAllSeconds seconds;
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    seconds.two_stages.push_back(
        run_threads(sites, two_stages(all_to_all), all_to_all, total_bytes(all_to_all.two_stages)));
    seconds.flat.push_back(
        run_threads(world, flat(all_to_all), all_to_all, total_bytes(all_to_all.flat)));
  }
  return seconds;
}

AllToAllSeconds run_over_nccl(const AllToAllCase& all_to_all, int64_t repeats, NcclWorlds worlds,
                              nccl::Device& device) {
  StagedTransport sites(worlds.sites, device), world(worlds.flat, device);
  AllToAllSeconds seconds;
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    seconds.two_stages.push_back(
        run_rank(sites, two_stages(all_to_all), all_to_all, total_bytes(all_to_all.two_stages)));
    seconds.flat.push_back(
        run_rank(world, flat(all_to_all), all_to_all, total_bytes(all_to_all.flat)));
  }
  return seconds;
}

}  // namespace bench
