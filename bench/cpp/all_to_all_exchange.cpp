// SPDX-License-Identifier: Apache-2.0
#include "all_to_all_exchange.h"

#include <cstring>
#include <numeric>
#include <utility>

namespace bench {
namespace {

using namespace fomoe::comm;
using Words = std::vector<float>;  // 4 bytes each: elements, weights, and ids by their bits
using Counts = std::vector<int64_t>;

constexpr int64_t kWordBytes = 4;

/// One collective: words to and from every member of the stage's group.
Words all_to_all(Transport& transport, Stage stage, const Words& send, Counts send_words,
                 Counts receive_words, int64_t& sent_bytes) {
  Words received(std::accumulate(receive_words.begin(), receive_words.end(), int64_t{0}));
  for (int64_t& words : send_words) words *= kWordBytes;
  for (int64_t& words : receive_words) words *= kWordBytes;
  transport.all_to_all(stage, send.data(), send_words.data(), received.data(), receive_words.data(),
                       nullptr);
  sent_bytes += static_cast<int64_t>(send.size()) * kWordBytes;
  return received;
}

Counts times(Counts rows, int64_t words) {
  for (int64_t& count : rows) count *= words;
  return rows;
}

int32_t id_of(float word) {
  int32_t id;
  std::memcpy(&id, &word, sizeof id);
  return id;
}

void append_id(Words& words, int32_t id) {
  float word;
  std::memcpy(&word, &id, sizeof word);
  words.push_back(word);
}

void append(Words& words, const float* begin, int64_t count) {
  words.insert(words.end(), begin, begin + count);
}

void add_row(float* sum, const float* row, int64_t width, float factor) {
  for (int64_t d = 0; d < width; ++d) sum[d] += factor * row[d];
}

/// Rows this rank sends to (and, of the matrix, receives from) every member of a stage's group.
class Sizes {
 public:
  Sizes(const Topology& topology, int rank, Counts matrix)
      : topology_(topology), rank_(rank), matrix_(std::move(matrix)) {}

  int64_t inter_site(int source, int destination) const {
    const int site = topology_.site_of(destination);
    if (site == topology_.site_of(source) || topology_.gateway(source, site) != destination) {
      return 0;
    }
    return at(source, site);
  }
  int64_t intra_node(int sender, int destination) const {
    const int site = topology_.site_of(sender);
    int64_t rows = at(sender, topology_.num_sites() + destination);
    for (int source = 0; source < topology_.num_ranks(); ++source) {
      if (topology_.site_of(source) == site || topology_.gateway(source, site) != sender) continue;
      rows += at(source, topology_.num_sites() + destination);
    }
    return rows;
  }

  std::pair<Counts, Counts> of(Transport& transport, Stage stage) const {
    Counts sent, received;
    for (const int member : transport.group(stage)) {
      const bool crosses = stage == Stage::inter_site;
      sent.push_back(crosses ? inter_site(rank_, member) : intra_node(rank_, member));
      received.push_back(crosses ? inter_site(member, rank_) : intra_node(member, rank_));
    }
    return {sent, received};
  }

 private:
  int64_t at(int rank, int column) const {
    return matrix_[rank * (topology_.num_sites() + topology_.num_ranks()) + column];
  }

  const Topology& topology_;
  const int rank_;
  const Counts matrix_;  // [ranks, sites + ranks]
};

Words dispatch_rows(const RankTokens& tokens) {
  Words rows;
  for (int64_t t = 0; t < tokens.count(); ++t) {
    append(rows, &tokens.x[t * tokens.width], tokens.width);
    for (int64_t k = 0; k < tokens.top_k; ++k) append_id(rows, tokens.ids[t * tokens.top_k + k]);
    append(rows, &tokens.weights[t * tokens.top_k], tokens.top_k);
  }
  return rows;
}

Words packed(const std::vector<Message>& messages, const Words& rows, int64_t row_words) {
  Words result;
  for (const Message& message : messages) {
    for (const int64_t row : message.rows) append(result, &rows[row * row_words], row_words);
  }
  return result;
}

/// Adds the rows that answer the messages to where they came from.
void add_answers(const std::vector<Message>& messages, const Words& answers, int64_t width,
                 Words& sums) {
  const float* next = answers.data();
  for (const Message& message : messages) {
    for (const int64_t row : message.rows) {
      add_row(&sums[row * width], next, width, 1);
      next += width;
    }
  }
}

Words execute(const Topology& topology, int rank, const RankTokens& tokens, const Words& arrived) {
  const int64_t width = tokens.width, row_words = width + 2 * tokens.top_k;
  const int64_t num_rows = static_cast<int64_t>(arrived.size()) / row_words;
  Words answers(num_rows * width, 0);
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* x = &arrived[row * row_words];
    float factor = 0;
    for (int64_t k = 0; k < tokens.top_k; ++k) {
      const int32_t id = id_of(x[width + k]);
      if (topology.owner_of(id) != rank) continue;
      factor += static_cast<float>(id + 1) * x[width + tokens.top_k + k];
    }
    add_row(&answers[row * width], x, width, factor);
  }
  return answers;
}

}  // namespace

Exchanged exchange_hierarchical(const Topology& topology, const RankPlan& plan,
                                const RankTokens& tokens, Transport& transport) {
  const int64_t width = tokens.width, row_words = width + 2 * tokens.top_k;
  const int rank = transport.rank(), num_ranks = topology.num_ranks();
  const auto num_counts = static_cast<int64_t>(plan.counts.size());
  Exchanged result;
  Counts matrix(num_ranks * num_counts);
  transport.gather_counts(plan.counts.data(), num_counts, matrix.data());
  result.sent_bytes += num_ranks * num_counts * 8;
  const Sizes sizes(topology, rank, matrix);
  const auto [to_sites, from_sites] = sizes.of(transport, Stage::inter_site);
  const auto [to_owners, from_holders] = sizes.of(transport, Stage::intra_node);
  const auto send = [&](Stage stage, const Words& rows, const Counts& sent, const Counts& received,
                        int64_t words) {
    return all_to_all(transport, stage, rows, times(sent, words), times(received, words),
                      result.sent_bytes);
  };

  Words held = dispatch_rows(tokens);
  const Words crossed = send(Stage::inter_site, packed(plan.inter_site, held, row_words), to_sites,
                             from_sites, row_words);
  append(held, crossed.data(), static_cast<int64_t>(crossed.size()));
  const Words arrived = send(Stage::intra_node, packed(plan.intra_node, held, row_words), to_owners,
                             from_holders, row_words);
  const Words answers = send(Stage::intra_node, execute(topology, rank, tokens, arrived),
                             from_holders, to_owners, width);
  Words sums(plan.held.size() * width, 0);
  add_answers(plan.intra_node, answers, width, sums);
  const int64_t own = tokens.count() * width;
  const Words returned =
      send(Stage::inter_site, Words(sums.begin() + own, sums.end()), from_sites, to_sites, width);
  result.y.assign(sums.begin(), sums.begin() + own);
  add_answers(plan.inter_site, returned, width, result.y);
  return result;
}

Exchanged exchange_flat(const Topology& topology, const RankTokens& tokens, Transport& transport) {
  const int64_t width = tokens.width;
  const int num_ranks = topology.num_ranks(), rank = transport.rank();
  std::vector<Message> messages(num_ranks);  // rows are slots
  for (size_t slot = 0; slot < tokens.ids.size(); ++slot) {
    const int owner = topology.owner_of(tokens.ids[slot]);
    if (owner >= 0) messages[owner].rows.push_back(static_cast<int64_t>(slot));
  }
  Exchanged result;
  Counts sent(num_ranks), received(num_ranks), matrix(num_ranks * num_ranks);
  for (int r = 0; r < num_ranks; ++r) sent[r] = static_cast<int64_t>(messages[r].rows.size());
  transport.gather_counts(sent.data(), num_ranks, matrix.data());
  result.sent_bytes += num_ranks * 8;  // each receiver needs one number of the row
  for (int r = 0; r < num_ranks; ++r) received[r] = matrix[r * num_ranks + rank];

  Words rows;
  for (const Message& message : messages) {
    for (const int64_t slot : message.rows) {
      append(rows, &tokens.x[slot / tokens.top_k * width], width);
      append_id(rows, tokens.ids[slot]);
    }
  }
  const Words arrived = all_to_all(transport, Stage::intra_node, rows, times(sent, width + 1),
                                   times(received, width + 1), result.sent_bytes);
  Words outputs(arrived.size() / (width + 1) * width, 0);
  for (size_t row = 0; row < outputs.size() / width; ++row) {
    const float* x = &arrived[row * (width + 1)];
    add_row(&outputs[row * width], x, width, static_cast<float>(id_of(x[width]) + 1));
  }
  const Words answers = all_to_all(transport, Stage::intra_node, outputs, times(received, width),
                                   times(sent, width), result.sent_bytes);
  result.y.assign(tokens.x.size(), 0);
  const float* next = answers.data();
  for (const Message& message : messages) {
    for (const int64_t slot : message.rows) {
      add_row(&result.y[slot / tokens.top_k * width], next, width, tokens.weights[slot]);
      next += width;
    }
  }
  return result;
}

std::vector<float> expected_result(const Topology& topology, const RankTokens& tokens) {
  std::vector<float> y(tokens.x.size(), 0);
  for (size_t slot = 0; slot < tokens.ids.size(); ++slot) {
    const int32_t id = tokens.ids[slot];
    if (topology.owner_of(id) < 0) continue;
    const int64_t first = static_cast<int64_t>(slot) / tokens.top_k * tokens.width;
    add_row(&y[first], &tokens.x[first], tokens.width,
            static_cast<float>(id + 1) * tokens.weights[slot]);
  }
  return y;
}

}  // namespace bench
