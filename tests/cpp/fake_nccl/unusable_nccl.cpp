// SPDX-License-Identifier: Apache-2.0
// A library that is not used after a look at it: of the version it is compiled with, and without
// ncclCommSplit. What is looked up before that is there, but does nothing.
#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int ncclGetVersion(int* version) {
  *version = FAKE_NCCL_VERSION;
  return 0;
}

EXPORTED void ncclGetErrorString() {}
EXPORTED void ncclGetLastError() {}
EXPORTED void ncclGetUniqueId() {}
EXPORTED void ncclCommInitRankConfig() {}
