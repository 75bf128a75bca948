// SPDX-License-Identifier: Apache-2.0
#include "comm/nccl/library.h"

#include <dlfcn.h>

#include <stdexcept>

namespace fomoe::comm::nccl {
namespace {

constexpr const char* kName = "libnccl.so.2";

std::string last_loader_error() {
  const char* message = dlerror();
  return message ? message : "no reason given";
}

/// Never null: throws what the loader said.
void* open_library(const std::string& path) {
  if (void* loaded = dlopen(kName, RTLD_NOW | RTLD_NOLOAD)) return loaded;
  const char* name = path.empty() ? kName : path.c_str();
  void* handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (!handle && !path.empty()) {
    const std::string about_path = last_loader_error();
    handle = dlopen(kName, RTLD_NOW | RTLD_LOCAL);
    if (!handle) throw std::runtime_error("NCCL: expected a library to load, got: " + about_path);
  }
  if (!handle) {
    throw std::runtime_error("NCCL: expected a library to load, got: " + last_loader_error() +
                             "; a CUDA build of torch for Linux brings one");
  }
  return handle;
}

/// 22809 as "2.28.9"; versions before 2.9 are written with one digit less.
std::string written(int version) {
  const int major = version >= 10000 ? 10000 : 1000;
  return std::to_string(version / major) + "." + std::to_string(version % major / 100) + "." +
         std::to_string(version % 100);
}

template <typename Function>
void find(void* handle, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(handle, name));
  if (!function) {
    throw std::runtime_error(
        std::string("NCCL: expected the loaded library to have the function ") + name +
        ", which it lacks");
  }
}

}  // namespace

std::shared_ptr<const Library> Library::open(const std::string& path) {
  return std::shared_ptr<const Library>(new Library(open_library(path)));
}

Library::Library(void* handle) {
  Result (*get_version)(int*) = nullptr;
  find(handle, "ncclGetVersion", get_version);
  if (get_version(&version_) != kSuccess) {
    throw std::runtime_error("NCCL: the loaded library cannot tell its version");
  }
  if (version_ < kOldestVersion) {
    throw std::runtime_error("NCCL: expected version " + written(kOldestVersion) +
                             " or newer, got " + written(version_));
  }
  find(handle, "ncclGetErrorString", get_error_string);
  find(handle, "ncclGetLastError", get_last_error);
  find(handle, "ncclGetUniqueId", get_unique_id);
  find(handle, "ncclCommInitRankConfig", comm_init_rank_config);
  find(handle, "ncclCommSplit", comm_split);
  find(handle, "ncclCommGetAsyncError", comm_get_async_error);
  find(handle, "ncclCommFinalize", comm_finalize);
  find(handle, "ncclCommDestroy", comm_destroy);
  find(handle, "ncclCommAbort", comm_abort);
  find(handle, "ncclGroupStart", group_start);
  find(handle, "ncclGroupEnd", group_end);
  find(handle, "ncclSend", send);
  find(handle, "ncclRecv", recv);
  find(handle, "ncclAllGather", all_gather);
}

}  // namespace fomoe::comm::nccl
