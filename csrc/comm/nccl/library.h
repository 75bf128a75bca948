// SPDX-License-Identifier: Apache-2.0
// The NCCL that torch brought, opened at run time: nothing of NCCL is needed to build or to load
// fomoe. Declares the few functions and types in use, as NCCL 2.18 and everything later has them.
#pragma once

#include <climits>
#include <cstddef>
#include <memory>
#include <string>

#include "fomoe/cuda.h"

struct ncclComm;

namespace fomoe::comm::nccl {

using Stream = cuda::Stream;

/// ncclResult_t; the values that are told apart.
using Result = int;
inline constexpr Result kSuccess = 0;
inline constexpr Result kInProgress = 7;

/// ncclDataType_t; the values in use.
inline constexpr int kBytes = 1;
inline constexpr int kInt64 = 4;

/// The color of a rank that gets no part of a split communicator.
inline constexpr int kNoColor = -1;

/// Oldest version that has ncclCommSplit, as ncclGetVersion writes it.
inline constexpr int kOldestVersion = 21800;

using Communicator = ncclComm*;

/// ncclUniqueId: what the ranks of a world need to find each other.
struct UniqueId {
  char bytes[128];
};

/// ncclConfig_t as of 2.18. Later versions read as much of it as `size` says.
struct Config {
  size_t size = sizeof(Config);
  unsigned int magic = 0xcafebeef;
  unsigned int version = kOldestVersion;
  int blocking = 0;
  int cga_cluster_size = INT_MIN;
  int min_ctas = INT_MIN;
  int max_ctas = INT_MIN;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
};

/// Functions of an opened NCCL, named as there without the prefix. It stays open until the process
/// ends, for it has threads of its own.
class Library {
 public:
  /// Takes the libnccl.so.2 that is already loaded, else the file `path` unless that is empty, else
  /// what the loader finds by name. Throws std::runtime_error, in one sentence, if there is none,
  /// it is older than 2.18, or lacks a function.
  static std::shared_ptr<const Library> open(const std::string& path);

  /// As ncclGetVersion writes it: 22809 is 2.28.9.
  int version() const { return version_; }

  const char* (*get_error_string)(Result);
  const char* (*get_last_error)(Communicator);
  Result (*get_unique_id)(UniqueId*);
  Result (*comm_init_rank_config)(Communicator*, int, UniqueId, int, Config*);
  Result (*comm_split)(Communicator, int, int, Communicator*, Config*);
  Result (*comm_get_async_error)(Communicator, Result*);
  Result (*comm_finalize)(Communicator);
  Result (*comm_destroy)(Communicator);
  Result (*comm_abort)(Communicator);
  Result (*group_start)();
  Result (*group_end)();
  Result (*send)(const void*, size_t, int, int, Communicator, Stream);
  Result (*recv)(void*, size_t, int, int, Communicator, Stream);
  Result (*all_gather)(const void*, void*, size_t, int, Communicator, Stream);

 private:
  explicit Library(void* handle);

  int version_ = 0;
};

}  // namespace fomoe::comm::nccl
