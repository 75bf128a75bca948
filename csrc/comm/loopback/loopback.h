// SPDX-License-Identifier: Apache-2.0
// All ranks in one process, one thread each, rows in host memory: for tests, and for benchmarks
// without a network. Copies are made one at a time.
#pragma once

#include <chrono>
#include <memory>

#include "comm/topology.h"
#include "comm/transport.h"

namespace fomoe::comm {

class Loopback {
 public:
  /// timeout: how long a call waits for the other members before it names one that is missing.
  Loopback(const Topology& topology, std::chrono::milliseconds timeout);
  ~Loopback();

  /// The end of a world rank; lives as long as this. Its calls also throw CommunicationError when
  /// a peer sends another number of bytes than this rank receives. The stream is not used.
  Transport& end(int rank);

 private:
  class World;
  class End;
  std::unique_ptr<World> world_;
  std::vector<std::unique_ptr<End>> ends_;  // [ranks]
};

}  // namespace fomoe::comm
