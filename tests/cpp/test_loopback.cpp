// SPDX-License-Identifier: Apache-2.0
#include "comm/loopback/loopback.h"

#include <functional>
#include <thread>

#include "harness.h"

namespace {

using namespace fomoe::comm;
using Bytes = std::vector<int64_t>;

constexpr std::chrono::seconds kLong{30};

/// Runs one thread per rank; returns the message each ended with, "" for none.
std::vector<std::string> run(const Topology& topology, std::chrono::milliseconds timeout,
                             const std::function<void(Transport&)>& body) {
  Loopback loopback(topology, timeout);
  std::vector<std::string> messages(topology.num_ranks());
  std::vector<std::thread> threads;
  for (int rank = 0; rank < topology.num_ranks(); ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(loopback.end(rank));
      } catch (const std::exception& error) {
        messages[rank] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return messages;
}

/// Sends `rank * 10 + member` as often as the member's number, to every member of the group.
std::string exchanged(Transport& transport, Stage stage) {
  const auto group = transport.group(stage);
  std::string send, received, expected;
  Bytes send_bytes, receive_bytes;
  for (const int member : group) {
    send.append(member, static_cast<char>(transport.rank() * 10 + member));
    send_bytes.push_back(member);
    receive_bytes.push_back(transport.rank());
    expected.append(transport.rank(), static_cast<char>(member * 10 + transport.rank()));
  }
  received.resize(expected.size());
  transport.all_to_all(stage, send.data(), send_bytes.data(), received.data(), receive_bytes.data(),
                       nullptr);
  return received == expected ? "right" : "wrong";
}

}  // namespace

TEST(everyone_gets_the_counts_of_everyone) {
  const auto messages = run(Topology({2, 1}, {}), kLong, [](Transport& transport) {
    const Bytes mine = {transport.rank(), 7};
    Bytes all(6);
    transport.gather_counts(mine.data(), 2, all.data());
    CHECK_EQUAL(all, (Bytes{0, 7, 1, 7, 2, 7}));
    CHECK_EQUAL(transport.world_size(), 3);
  });
  CHECK_EQUAL(messages, std::vector<std::string>(3));
}

TEST(bytes_go_to_their_member_in_every_stage_and_call) {
  for (const auto& ranks_per_site : std::vector<std::vector<int>>{{2, 2}, {3, 1}, {4}, {1, 1, 1}}) {
    const Topology topology(ranks_per_site, {});
    const auto messages = run(topology, kLong, [](Transport& transport) {
      for (int call = 0; call < 50; ++call) {
        CHECK_EQUAL(exchanged(transport, Stage::inter_site), "right");
        CHECK_EQUAL(exchanged(transport, Stage::intra_node), "right");
      }
    });
    CHECK_EQUAL(messages, std::vector<std::string>(topology.num_ranks()));
  }
}

TEST(a_rank_that_does_not_come_is_named_within_the_timeout) {
  const auto messages =
      run(Topology({3}, {}), std::chrono::milliseconds(50), [](Transport& transport) {
        if (transport.rank() != 1) exchanged(transport, Stage::intra_node);
      });
  CHECK_EQUAL(messages[0],
              "intra-node all-to-all of rank 0 with rank 1: it did not take part within 50 ms");
  CHECK_EQUAL(messages[2],
              "intra-node all-to-all of rank 2 with rank 1: it did not take part within 50 ms");
}

TEST(a_rank_that_aborts_ends_the_calls_of_the_others) {
  const auto messages = run(Topology({1, 1, 1}, {}), kLong, [](Transport& transport) {
    if (transport.rank() == 2) return transport.abort();
    exchanged(transport, Stage::inter_site);
  });
  CHECK_EQUAL(messages[0], "inter-site all-to-all of rank 0 with rank 2: it has aborted");
  CHECK_EQUAL(messages[1], "inter-site all-to-all of rank 1 with rank 2: it has aborted");
}

TEST(ranks_that_disagree_on_bytes_are_named) {
  const auto messages = run(Topology({2}, {}), kLong, [](Transport& transport) {
    const Bytes send_bytes = {0, 8};
    const Bytes receive_bytes = transport.rank() == 0 ? Bytes{0, 0} : Bytes{4, 8};
    char send[8] = {}, received[16];
    transport.all_to_all(Stage::intra_node, send, send_bytes.data(), received, receive_bytes.data(),
                         nullptr);
  });
  CHECK_EQUAL(messages[1],
              "intra-node all-to-all of rank 1 with rank 0: expected 4 bytes, it sends 8");
  CHECK_EQUAL(messages[0], "intra-node all-to-all of rank 0 with rank 1: it has failed");
}

TEST(an_error_carries_stage_rank_and_peer) {
  const CommunicationError error("counts", 3, 5, "gone");
  CHECK_EQUAL(error.stage(), "counts");
  CHECK_EQUAL(error.rank(), 3);
  CHECK_EQUAL(error.peer(), 5);
  CHECK_EQUAL(std::string(error.what()), "counts all-to-all of rank 3 with rank 5: gone");
}
