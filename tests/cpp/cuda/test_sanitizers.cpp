// SPDX-License-Identifier: Apache-2.0
// What the sanitizers find out about emulated kernels. They end the program, so each kernel runs in
// a child process. Without sanitizers there is nothing to test.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <vector>

#include "harness.h"

#include "cuda_emulation.h"

#include "cuda/device.cuh"
#include "cuda/memory.cuh"

#ifdef __SANITIZE_ADDRESS__

namespace {

using namespace fomoe::cuda;

/// Whether a kernel that calls body once ends in good health.
template <typename Body>
bool ends_well(const Body& body) {
  const pid_t child = fork();
  if (child == 0) {
    dup2(open("/dev/null", O_WRONLY), STDERR_FILENO);
    try {
      fomoe::emulation::launch("kernel", 1, 1, 64, body);
    } catch (const std::exception&) {
      _exit(1);
    }
    _exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/// Read and written in kernels without the functions of memory.cuh, which do checks of their own.
alignas(16) Packet<16> packets[3];
volatile int64_t offset = 0;  // unknown to the compiler

Packet<16>* packet_at(void* base, int64_t bytes) {
  return reinterpret_cast<Packet<16>*>(static_cast<char*>(base) + bytes + offset);
}

}  // namespace

TEST(a_misaligned_access_ends_the_program) {
  const auto store = [](int64_t bytes) { *packet_at(packets, bytes) = packets[2]; };
  CHECK(ends_well([=] { store(16); }));
  CHECK(!ends_well([=] { store(8); }));
  const auto load = [](int64_t bytes) { packets[2] = *packet_at(packets, bytes); };
  CHECK(ends_well([=] { load(16); }));
  CHECK(!ends_well([=] { load(8); }));
}

TEST(an_overrun_of_global_memory_ends_the_program) {
  std::vector<float> array(8);
  CHECK(ends_well([&] { store_global(array.data() + 7 + offset, 0.0f); }));
  CHECK(!ends_well([&] { store_global(array.data() + 8 + offset, 0.0f); }));
}

TEST(an_overrun_of_shared_memory_ends_the_program) {
  const auto store = [](int64_t i) { (&dynamic_shared<float>())[i + offset] = 0; };
  CHECK(ends_well([=] { store(15); }));
  CHECK(!ends_well([=] { store(16); }));
}

#endif
