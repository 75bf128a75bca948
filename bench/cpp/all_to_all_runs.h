// SPDX-License-Identifier: Apache-2.0
// The exchanges of bench_all_to_all over a transport, checked against results and bytes.
#pragma once

#include <vector>

#include "all_to_all_case.h"
#include "comm/nccl/device.h"
#include "comm/nccl/transport.h"

namespace bench {

/// Of each repetition, those of the slowest rank.
struct AllToAllSeconds {
  std::vector<double> two_stages, flat;
};

/// All ranks as threads of this process. Throws std::runtime_error if a result is wrong.
AllToAllSeconds run_over_loopback(const AllToAllCase& all_to_all, int64_t repeats);

/// The two worlds of a rank: its sites, and all ranks as one site.
struct NcclWorlds {
  fomoe::comm::nccl::NcclTransport &sites, &flat;
};

/// One rank; all ranks call it. Rows are packed in host memory: seconds include their copies to the
/// device and back, through `device`. Throws like run_over_loopback.
AllToAllSeconds run_over_nccl(const AllToAllCase& all_to_all, int64_t repeats, NcclWorlds worlds,
                              fomoe::comm::nccl::Device& device);

}  // namespace bench
