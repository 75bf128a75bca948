// SPDX-License-Identifier: Apache-2.0
// The runs of bench_all_to_all over the fake NCCL: results and bytes are checked within them.
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>

#include "all_to_all_runs.h"
#include "comm/nccl/library.h"
#include "fake_nccl/fake_nccl.h"
#include "fake_nccl/host_device.h"
#include "harness.h"

namespace {

using namespace fomoe::comm;
using bench::AllToAllCase;

constexpr std::chrono::milliseconds kAmple{20'000};

/// The first error of a rank, or "".
std::string run_all_ranks(const AllToAllCase& all_to_all, int sites, int ranks_per_site) {
  const auto library = nccl::Library::open(FAKE_NCCL);
  nccl::UniqueId of_sites, of_flat;
  library->get_unique_id(&of_sites);
  library->get_unique_id(&of_flat);
  const int num_ranks = sites * ranks_per_site;
  std::vector<std::string> errors(num_ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        fake::Timeline timeline;
        fake::HostDevice device(timeline);
        const auto world = [&](std::vector<int> ranks, const nccl::UniqueId& id) {
          return std::make_unique<nccl::NcclTransport>(
              library, std::make_unique<fake::HostDevice>(timeline),
              nccl::World{std::move(ranks), rank, id, kAmple});
        };
        const auto two_stages = world(std::vector<int>(sites, ranks_per_site), of_sites);
        const auto flat = world({num_ranks}, of_flat);
        const auto seconds = run_over_nccl(all_to_all, 2, {*two_stages, *flat}, device);
        if (seconds.two_stages.size() != 2 || seconds.flat.size() != 2) {
          throw std::logic_error("a repetition is missing");
        }
      } catch (const std::exception& error) {
        errors[rank] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : errors) {
    if (!error.empty()) return error;
  }
  return "";
}

}  // namespace

TEST(exchanges_over_nccl_give_the_expected_rows_and_bytes) {
  for (const auto& [sites, ranks] : {std::pair{1, 3}, {2, 2}, {3, 1}}) {
    const AllToAllCase all_to_all({sites, ranks, 9, 12, 4, 7, 1});
    CHECK_EQUAL(run_all_ranks(all_to_all, sites, ranks), "");
  }
}

TEST(a_wrong_result_or_byte_is_found) {
  AllToAllCase wrong_row({2, 1, 5, 8, 2, 3, 1});
  wrong_row.expected[1][4] += 1;
  CHECK_EQUAL(run_all_ranks(wrong_row, 2, 1), "rank 1 has a wrong result");
  AllToAllCase wrong_bytes({2, 1, 5, 8, 2, 3, 1});
  wrong_bytes.two_stages.counts.inter_site += 8;
  CHECK_EQUAL(run_all_ranks(wrong_bytes, 2, 1).substr(0, 5), "sent ");
}
