// SPDX-License-Identifier: Apache-2.0
// What a test tells the fake NCCL, and asks it.
#pragma once

extern "C" {

/// All communicators but those of `world_rank` report this ncclResult_t from now on, until 0.
void fake_nccl_report_error(int world_rank, int result);

/// What ncclGroupEnd returns from now on, until 0.
void fake_nccl_refuse_groups(int result);

/// Communicators that exist.
int fake_nccl_num_communicators();

/// Communicators that were aborted so far.
int fake_nccl_num_aborted();
}
