// SPDX-License-Identifier: Apache-2.0
// The NCCL transport over a fake NCCL: ranks are threads, their device is host memory.
#include <dlfcn.h>

#include <exception>
#include <numeric>
#include <string>
#include <thread>

#include "comm/nccl/library.h"
#include "comm/nccl/transport.h"
#include "fake_nccl/fake_nccl.h"
#include "fake_nccl/host_device.h"
#include "harness.h"

using fomoe::comm::CommunicationError;
using fomoe::comm::Stage;
using fomoe::comm::nccl::Library;
using fomoe::comm::nccl::NcclTransport;
using fomoe::comm::nccl::UniqueId;
using Ints = std::vector<int>;
using Counts = std::vector<int64_t>;
using Bytes = std::vector<char>;
using std::chrono::milliseconds;

namespace {

constexpr milliseconds kAmple{20'000}, kShort{200};

template <typename Function>
Function* fake_function(const char* name) {
  void* handle = dlopen(FAKE_NCCL, RTLD_NOW | RTLD_NOLOAD);
  return reinterpret_cast<Function*>(dlsym(handle, name));
}

/// A rank's end: its device and transport.
struct Rank {
  int rank;
  Ints sites;
  fake::Timeline timeline;
  fake::StreamOfWork stream{timeline};
  std::unique_ptr<NcclTransport> transport;

  Rank(int rank, const Ints& sites, const UniqueId& id, milliseconds timeout)
      : rank(rank),
        sites(sites),
        transport(std::make_unique<NcclTransport>(
            Library::open(FAKE_NCCL), std::make_unique<fake::HostDevice>(timeline),
            fomoe::comm::nccl::World{sites, rank, id, timeout})) {}

  Counts gathered(Counts mine) {
    Counts all(mine.size() * transport->world_size(), -1);
    transport->gather_counts(mine.data(), static_cast<int64_t>(mine.size()), all.data());
    return all;
  }

  /// What comes of sending text[i] to member i, whose texts have the lengths of `lengths`.
  std::string exchanged(Stage stage, const std::vector<std::string>& texts, const Counts& lengths) {
    Counts sizes;
    sent = "";
    for (const std::string& text : texts) {
      sent += text;
      sizes.push_back(static_cast<int64_t>(text.size()));
    }
    received.assign(std::accumulate(lengths.begin(), lengths.end(), size_t{0}), '?');
    transport->all_to_all(stage, sent.data(), sizes.data(), received.data(), lengths.data(),
                          &stream);
    gathered({0});  // waits for what is before it
    return received;
  }

  std::string sent, received;  // live until the exchange has ended or failed
};

std::vector<std::string> run_ranks(const Ints& sites, milliseconds timeout,
                                   const std::function<void(Rank&)>& body) {
  UniqueId id;
  Library::open(FAKE_NCCL)->get_unique_id(&id);
  const int world = static_cast<int>(std::accumulate(sites.begin(), sites.end(), int64_t{0}));
  std::vector<std::string> errors(world);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        Rank self(rank, sites, id, timeout);
        body(self);
      } catch (const std::exception& error) {
        errors[rank] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

/// Runs the body on every rank of the sites and fails with the first rank's error.
void on_ranks(const Ints& sites, const std::function<void(Rank&)>& body) {
  for (const std::string& error : run_ranks(sites, kAmple, body)) CHECK_EQUAL(error, "");
}

std::string error_of_opening(const char* path) {
  try {
    Library::open(path);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "none";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST(a_missing_old_or_incomplete_library_is_named_in_one_sentence) {
  CHECK(contains(error_of_opening("/no/such/libnccl.so"),
                 "NCCL: expected a library to load, got: /no/such/libnccl.so: cannot open"));
  CHECK(contains(error_of_opening(""), "NCCL: expected a library to load, got: libnccl.so.2"));
  CHECK_EQUAL(error_of_opening(FAKE_NCCL_OLD),
              "NCCL: expected version 2.18.0 or newer, got 2.17.1");
  CHECK_EQUAL(error_of_opening(FAKE_NCCL_WITHOUT_SPLIT),
              "NCCL: expected the loaded library to have the function ncclCommSplit, which it "
              "lacks");
  CHECK_EQUAL(Library::open(FAKE_NCCL)->version(), 22809);
}

TEST(a_machine_without_a_usable_device_says_so) {
  try {
    fomoe::comm::nccl::cuda_device();
  } catch (const std::runtime_error& error) {
    CHECK_EQUAL(std::string(error.what()).substr(0, 6), "NCCL: ");
  }
}

TEST(sites_and_rank_that_do_not_fit_are_refused) {
  const auto message = [](const Ints& sites, int rank) -> std::string {
    try {
      Rank(rank, sites, UniqueId{}, kShort);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "none";
  };
  CHECK_EQUAL(message({2, 0}, 1), "topology: ranks_per_site must be at least 1, got 0 for site 1");
  CHECK_EQUAL(message({2, 1}, 3), "rank: expected one of the 3 ranks of ranks_per_site, got 3");
}

TEST(counts_of_every_rank_come_in_the_order_of_ranks) {
  on_ranks({2, 1}, [](Rank& self) {
    const int64_t mine = 10 * self.rank;
    CHECK_EQUAL(self.gathered({mine, mine + 1}), (Counts{0, 1, 10, 11, 20, 21}));
    CHECK_EQUAL(self.gathered({mine}), (Counts{0, 10, 20}));
  });
}

TEST(uneven_rows_of_two_ranks_arrive_and_a_count_of_zero_sends_nothing) {
  on_ranks({1, 1}, [](Rank& self) {
    const bool is_first = self.rank == 0;
    CHECK_EQUAL(self.exchanged(Stage::inter_site,
                               is_first ? std::vector<std::string>{"a", "bcd"}
                                        : std::vector<std::string>{"", "e"},
                               is_first ? Counts{1, 0} : Counts{3, 1}),
                is_first ? "a" : "bcde");
    CHECK_EQUAL(self.exchanged(Stage::inter_site, {"", ""}, {0, 0}), "");
    CHECK_EQUAL(self.exchanged(Stage::intra_node, {"own"}, {3}), "own");
  });
}

TEST(one_rank_gets_its_own_rows_in_both_stages) {
  on_ranks({1}, [](Rank& self) {
    CHECK_EQUAL(self.exchanged(Stage::inter_site, {"xyz"}, {3}), "xyz");
    CHECK_EQUAL(self.exchanged(Stage::intra_node, {"xyz"}, {3}), "xyz");
  });
}

TEST(every_rank_gets_what_each_of_its_group_sent_it_whatever_the_sites) {
  // Rank r sends member m (r + 2m + round) % 4 letters of its own.
  const auto text = [](int from, int to, int round) {
    return std::string((from + 2 * to + round) % 4, static_cast<char>('A' + from));
  };
  for (const Ints& sites : {Ints{4}, {2, 2}, {3, 1}, {1, 1, 1, 1}, {1, 2, 3}}) {
    on_ranks(sites, [&](Rank& self) {
      for (int round = 0; round < 4; ++round) {
        for (const Stage stage : {Stage::inter_site, Stage::intra_node}) {
          std::vector<std::string> texts;
          Counts lengths;
          std::string expected;
          for (const int peer : self.transport->group(stage)) {
            texts.push_back(text(self.rank, peer, round));
            expected += text(peer, self.rank, round);
            lengths.push_back(static_cast<int64_t>(text(peer, self.rank, round).size()));
          }
          CHECK_EQUAL(self.exchanged(stage, texts, lengths), expected);
        }
      }
    });
  }
}

TEST(exchanges_that_nobody_waits_for_run_in_the_order_of_the_calls) {
  on_ranks({2}, [](Rank& self) {
    const std::string first(3, static_cast<char>('a' + self.rank));
    std::string second = "???", third = "???";
    const Counts sizes = self.rank == 0 ? Counts{0, 3} : Counts{3, 0};
    fake::StreamOfWork other(self.timeline);
    self.transport->all_to_all(Stage::intra_node, first.data(), sizes.data(), second.data(),
                               sizes.data(), &self.stream);
    self.transport->all_to_all(Stage::intra_node, second.data(), sizes.data(), third.data(),
                               sizes.data(), &other);
    self.gathered({0});
    CHECK_EQUAL(second, std::string(3, static_cast<char>('b' - self.rank)));
    CHECK_EQUAL(third, first);
  });
}

TEST(a_rank_that_does_not_come_ends_the_others) {
  UniqueId id;
  Library::open(FAKE_NCCL)->get_unique_id(&id);
  std::string message = "none";
  try {
    Rank alone(0, {1, 1}, id, kShort);
  } catch (const CommunicationError& error) {
    message = error.what();
  }
  CHECK_EQUAL(message,
              "setup all-to-all of rank 0: the other ranks did not take part within 0.2 s");
}

TEST(a_rank_that_leaves_ends_the_others_with_stage_and_rank) {
  const std::vector<std::string> errors = run_ranks({3}, kShort, [](Rank& self) {
    if (self.rank != 1) self.exchanged(Stage::intra_node, {"a", "b", "c"}, {1, 1, 1});
  });
  CHECK_EQUAL(errors[0],
              "intra-node all-to-all of rank 0: the other ranks did not take part within 0.2 s");
  CHECK_EQUAL(errors[2],
              "intra-node all-to-all of rank 2: the other ranks did not take part within 0.2 s");
}

TEST(an_exchange_nobody_waits_for_is_ended_by_the_watching_thread) {
  const std::vector<std::string> errors = run_ranks({1, 1}, kShort, [](Rank& self) {
    if (self.rank == 1) return;
    std::string sent = "ab", received = "??";
    const Counts sizes = {1, 1};
    self.transport->all_to_all(Stage::inter_site, sent.data(), sizes.data(), received.data(),
                               sizes.data(), &self.stream);
    for (;;) self.transport->check();  // ends by throwing
  });
  CHECK(contains(errors[0], "inter-site all-to-all of rank 0: the other ranks did not"));
}

TEST(counts_that_differ_end_in_an_error_and_not_in_a_hang) {
  const std::vector<std::string> errors = run_ranks({2}, kShort, [](Rank& self) {
    self.exchanged(Stage::intra_node, {"aa", "aa"}, self.rank == 0 ? Counts{2, 2} : Counts{3, 2});
  });
  CHECK(contains(errors[1], "intra-node all-to-all of rank 1: "));
}

TEST(what_nccl_finds_is_said_and_later_calls_say_it_again) {
  auto* const report = fake_function<decltype(fake_nccl_report_error)>("fake_nccl_report_error");
  auto* const num_aborted = fake_function<decltype(fake_nccl_num_aborted)>("fake_nccl_num_aborted");
  const int before = num_aborted();
  const std::vector<std::string> errors = run_ranks({2}, kAmple, [&](Rank& self) {
    self.gathered({1});
    if (self.rank == 1) {
      report(1, 6);
      while (num_aborted() == before) std::this_thread::yield();
      self.transport->abort();
      report(1, 0);
      return;
    }
    std::string first;
    try {
      self.exchanged(Stage::intra_node, {"a", "b"}, {1, 1});
    } catch (const CommunicationError& error) {
      first = error.what();
    }
    try {
      self.gathered({1});
    } catch (const CommunicationError& error) {
      CHECK_EQUAL(first, std::string(error.what()));
    }
    throw std::runtime_error(first);
  });
  CHECK_EQUAL(errors[1], "");
  CHECK(contains(errors[0],
                 " of rank 0: NCCL said: remote process exited or there was a network "
                 "error (fake detail)"));
}

TEST(what_nccl_refuses_is_an_error_of_the_stage) {
  auto* const refuse = fake_function<decltype(fake_nccl_refuse_groups)>("fake_nccl_refuse_groups");
  refuse(4);
  const std::vector<std::string> errors = run_ranks(
      {2}, kAmple, [](Rank& self) { self.exchanged(Stage::intra_node, {"a", "b"}, {1, 1}); });
  refuse(0);
  CHECK_EQUAL(errors[0],
              "intra-node all-to-all of rank 0: NCCL said: invalid argument (fake detail)");
}

TEST(an_abort_ends_own_calls_at_once_and_those_of_the_peers_within_their_timeout) {
  const std::vector<std::string> errors = run_ranks({2}, kShort, [](Rank& self) {
    if (self.rank == 0) self.transport->abort();
    self.gathered({1});
  });
  CHECK_EQUAL(errors[0], "counts all-to-all of rank 0: it was aborted");
  CHECK_EQUAL(errors[1],
              "counts all-to-all of rank 1: the other ranks did not take part within 0.2 s");
}

TEST(no_communicator_is_left_behind) {
  CHECK_EQUAL(fake_function<decltype(fake_nccl_num_communicators)>("fake_nccl_num_communicators")(),
              0);
}
