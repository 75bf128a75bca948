// SPDX-License-Identifier: Apache-2.0
// What the two-stage all-to-all needs of a network. Every call is collective: all ranks of the
// world (gather_counts) or of the stage's group (all_to_all) make the same calls in the same order,
// also those without a row to send.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "fomoe/cuda.h"

namespace fomoe::comm {

/// A rank failed, left or fell silent. The transport cannot be used any more.
class CommunicationError : public std::runtime_error {
 public:
  /// stage: "counts", "intra-node", "inter-site". rank: whose call failed. peer: the world rank at
  /// fault, -1 when it is not known.
  CommunicationError(const std::string& stage, int rank, int peer, const std::string& reason)
      : std::runtime_error(stage + " all-to-all of rank " + std::to_string(rank) +
                           (peer < 0 ? "" : " with rank " + std::to_string(peer)) + ": " + reason),
        stage_(stage),
        rank_(rank),
        peer_(peer) {}

  const std::string& stage() const { return stage_; }
  int rank() const { return rank_; }
  int peer() const { return peer_; }

 private:
  std::string stage_;
  int rank_;
  int peer_;
};

enum class Stage { intra_node, inter_site };

inline const char* name_of(Stage stage) {
  return stage == Stage::intra_node ? "intra-node" : "inter-site";
}

/// One rank's end of the world. Used by one thread at a time, except for abort.
class Transport {
 public:
  Transport() = default;
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;
  virtual ~Transport() = default;

  virtual int rank() const = 0;
  virtual int world_size() const = 0;

  /// mine [count], in host memory, of every rank by rank: all [world_size, count]. Returns when
  /// `all` is filled. count is the same on every rank.
  virtual void gather_counts(const int64_t* mine, int64_t count, int64_t* all) = 0;

  /// World ranks this one exchanges rows with in a stage, ascending, itself included.
  virtual std::span<const int> group(Stage stage) const = 0;

  /// Bytes for and from every member of the group, itself included, in the group's order; `send`
  /// and `receive` hold them one member after the other, in the memory the transport is for. On a
  /// device the exchange is enqueued on the stream: buffers must live until it is done.
  /// What a member sends another is what that one receives from it, or the results are undefined.
  virtual void all_to_all(Stage stage, const void* send, const int64_t* send_bytes, void* receive,
                          const int64_t* receive_bytes, cuda::Stream stream) = 0;

  /// Ends this rank's calls and those of its peers with a CommunicationError, now or within their
  /// timeout. May be called from any thread, more than once.
  virtual void abort() = 0;
};

}  // namespace fomoe::comm
