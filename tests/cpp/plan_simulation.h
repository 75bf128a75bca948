// SPDX-License-Identifier: Apache-2.0
// Random topologies and routings, and an exchange that follows a plan to the letter.
#pragma once

#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "comm/plan.h"
#include "comm/traffic.h"
#include "harness.h"

namespace plan_simulation {

using fomoe::comm::LinkBytes;
using fomoe::comm::Message;
using fomoe::comm::plan_all_to_all;
using fomoe::comm::RankPlan;
using fomoe::comm::RowFormat;
using fomoe::comm::Topology;
using fomoe::comm::Traffic;
using Ints = std::vector<int>;
using Ids = std::vector<std::vector<int32_t>>;

struct Case {
  Topology topology;
  Ids ids_of_rank;
  int64_t top_k;
};

inline Case random_case(uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](int end) { return static_cast<int>(random() % end); };
  Ints ranks_per_site(1 + below(4));
  for (int& ranks : ranks_per_site) ranks = 1 + below(4);
  int num_ranks = 0;
  for (const int ranks : ranks_per_site) num_ranks += ranks;
  Ints owners(1 + below(12));
  for (int& owner : owners) owner = below(5) == 0 ? -1 : below(num_ranks);
  const int64_t top_k = 1 + below(4);
  Ids ids(num_ranks);
  for (auto& of_rank : ids) {
    of_rank.resize(below(3) == 0 ? 0 : below(7) * top_k);
    for (int32_t& id : of_rank) id = below(static_cast<int>(owners.size()) + 1) - 1;
  }
  return {Topology(ranks_per_site, owners), ids, top_k};
}

/// One row as it crosses a wire: an element names the rank, the other the token.
struct WireRow {
  float rank, token;
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

inline RowFormat format_of(const Case& problem) { return {2, 4, 4, problem.top_k}; }

/// What an expert makes of a row: whole numbers, so that sums are exact.
inline double answer(float rank, float token, int32_t expert, float weight) {
  return (1 + rank + 16 * token + 256 * expert) * weight;
}

inline float weight_of(int64_t k) { return static_cast<float>(k + 1); }

/// Moves bytes between ranks and counts them by the sites of both ends.
class Wire {
 public:
  explicit Wire(const Topology& topology) : topology_(topology) {}

  void send(int source, int destination, const void* bytes, size_t count) {
    std::string& mail = mail_[{destination, source}];
    mail.append(static_cast<const char*>(bytes), count);
    int64_t& sum = source == destination                     ? bytes_.local
                   : site_of(source) == site_of(destination) ? bytes_.intra_node
                                                             : bytes_.inter_site;
    sum += static_cast<int64_t>(count);
  }
  template <typename T>
  void send_all(int source, int destination, const std::vector<T>& values) {
    send(source, destination, values.data(), values.size() * sizeof(T));
  }

  std::string receive(int destination, int source) {
    std::string mail;
    std::swap(mail, mail_[{destination, source}]);
    return mail;
  }

  const LinkBytes& bytes() const { return bytes_; }

 private:
  int site_of(int rank) const {
    int site = 0;
    while (rank >= topology_.num_ranks(site)) rank -= topology_.num_ranks(site++);
    return site;
  }

  const Topology& topology_;
  std::map<std::pair<int, int>, std::string> mail_;
  LinkBytes bytes_;
};

/// An exchange that follows the plans to the letter and looks only at what it has received.
class Simulation {
 public:
  explicit Simulation(const Case& problem)
      : problem_(problem),
        topology_(problem.topology),
        plans_(plan_all_to_all(topology_, problem.ids_of_rank, problem.top_k)),
        there_(topology_),
        back_(topology_) {
    dispatch();
    execute();
    combine();
  }

  const std::vector<RankPlan>& plans() const { return plans_; }
  Traffic traffic() const {
    Wire counts(topology_);
    for (int source = 0; source < topology_.num_ranks(); ++source) {
      for (int rank = 0; rank < topology_.num_ranks(); ++rank) {
        counts.send_all(source, rank, plans_[source].counts);
      }
    }
    return {counts.bytes(), there_.bytes(), back_.bytes()};
  }
  /// How often an owner executed (rank, token, expert).
  const std::map<std::tuple<int, int, int>, int>& executions() const { return executions_; }
  const std::vector<double>& result(int rank) const { return results_[rank]; }

 private:
  void send(int source, int destination, const WireRow& row) {
    there_.send(source, destination, &row.rank, 4);
    there_.send(source, destination, &row.token, 4);
    there_.send_all(source, destination, row.ids);
    there_.send_all(source, destination, row.weights);
  }

  std::vector<WireRow> receive(int rank, const Ints& sources) {
    std::vector<WireRow> rows;
    for (const int source : sources) {
      const std::string mail = there_.receive(rank, source);
      const size_t top_k = problem_.top_k, size = 8 + 8 * top_k;
      CHECK_EQUAL(mail.size() % size, 0u);
      for (size_t at = 0; at < mail.size(); at += size) {
        WireRow row = {0, 0, std::vector<int32_t>(top_k), std::vector<float>(top_k)};
        std::memcpy(&row.rank, &mail[at], 4);
        std::memcpy(&row.token, &mail[at + 4], 4);
        std::memcpy(row.ids.data(), &mail[at + 8], 4 * top_k);
        std::memcpy(row.weights.data(), &mail[at + 8 + 4 * top_k], 4 * top_k);
        rows.push_back(row);
      }
    }
    return rows;
  }

  void dispatch() {
    const int num_ranks = topology_.num_ranks();
    held_.resize(num_ranks);
    for (int rank = 0; rank < num_ranks; ++rank) {
      const auto& ids = problem_.ids_of_rank[rank];
      for (size_t first = 0; first < ids.size(); first += problem_.top_k) {
        WireRow row = {float(rank), float(first / problem_.top_k), {}, {}};
        row.ids.assign(ids.begin() + first, ids.begin() + first + problem_.top_k);
        for (int64_t k = 0; k < problem_.top_k; ++k) row.weights.push_back(weight_of(k));
        held_[rank].push_back(row);
      }
      for (const Message& message : plans_[rank].inter_site) {
        for (const int64_t t : message.rows) send(rank, message.destination, held_[rank][t]);
      }
    }
    Ints everyone(num_ranks);
    for (int rank = 0; rank < num_ranks; ++rank) everyone[rank] = rank;
    for (int rank = 0; rank < num_ranks; ++rank) {
      const auto rows = receive(rank, everyone);
      held_[rank].insert(held_[rank].end(), rows.begin(), rows.end());
      CHECK_EQUAL(held_[rank].size(), plans_[rank].held.size());
    }
    for (int rank = 0; rank < num_ranks; ++rank) {
      for (const Message& message : plans_[rank].intra_node) {
        for (const int64_t h : message.rows) send(rank, message.destination, held_[rank][h]);
      }
    }
    for (int rank = 0; rank < num_ranks; ++rank) arrived_.push_back(receive(rank, everyone));
  }

  void execute() {
    for (int rank = 0; rank < topology_.num_ranks(); ++rank) {
      std::vector<double>& answers = answers_.emplace_back();
      for (const WireRow& row : arrived_[rank]) {
        double sum = 0;
        for (int64_t k = 0; k < problem_.top_k; ++k) {
          if (topology_.owner_of(row.ids[k]) != rank) continue;
          ++executions_[{int(row.rank), int(row.token), int(k)}];
          sum += answer(row.rank, row.token, row.ids[k], row.weights[k]);
        }
        answers.push_back(sum);
      }
      CHECK_EQUAL(answers.size(), plans_[rank].arrived.size());
    }
  }

  /// The next answer from every peer, in the order of the rows once sent there.
  double next(int rank, int source, std::map<std::pair<int, int>, std::string>& mail) {
    std::string& bytes = mail[{rank, source}];
    if (bytes.empty()) bytes = back_.receive(rank, source);
    CHECK(bytes.size() >= 8);
    double value;
    std::memcpy(&value, bytes.data(), 8);
    bytes.erase(0, 8);
    return value;
  }

  void combine() {
    const int num_ranks = topology_.num_ranks();
    std::map<std::pair<int, int>, std::string> mail;
    std::vector<std::vector<double>> sums(num_ranks);
    for (int rank = 0; rank < num_ranks; ++rank) {
      auto next_answer = answers_[rank].begin();
      for (const int peer : topology_.intra_node_group(rank)) {
        for (size_t i = 0; i < message(plans_[peer].intra_node, rank).rows.size(); ++i) {
          const double value = *next_answer++;
          back_.send(rank, peer, &value, 8);
        }
      }
    }
    for (int rank = 0; rank < num_ranks; ++rank) {
      for (const auto& owners : plans_[rank].owners) {
        double sum = 0;
        for (const int owner : owners) sum += next(rank, owner, mail);
        sums[rank].push_back(sum);
      }
    }
    for (int rank = 0; rank < num_ranks; ++rank) {
      for (size_t h = problem_.ids_of_rank[rank].size() / problem_.top_k; h < sums[rank].size();
           ++h) {
        back_.send(rank, plans_[rank].held[h].rank, &sums[rank][h], 8);
      }
    }
    for (int rank = 0; rank < num_ranks; ++rank) {
      std::vector<double>& y = results_.emplace_back();
      for (size_t t = 0; t < plans_[rank].sites.size(); ++t) {
        double sum = sums[rank][t];
        for (const int site : plans_[rank].sites[t]) {
          sum += next(rank, topology_.gateway(rank, site), mail);
        }
        y.push_back(sum);
      }
    }
    for (const auto& [key, rest] : mail) CHECK(rest.empty());
  }

  static const Message& message(const std::vector<Message>& messages, int destination) {
    for (const Message& message : messages) {
      if (message.destination == destination) return message;
    }
    throw std::runtime_error("no message");
  }

  const Case& problem_;
  const Topology& topology_;
  std::vector<RankPlan> plans_;
  Wire there_, back_;
  std::vector<std::vector<WireRow>> held_, arrived_;
  std::vector<std::vector<double>> answers_, results_;
  std::map<std::tuple<int, int, int>, int> executions_;
};

}  // namespace plan_simulation
