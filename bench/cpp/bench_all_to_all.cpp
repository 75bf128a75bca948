// SPDX-License-Identifier: Apache-2.0
// The two-stage all-to-all against the flat one, all ranks in this process: bytes by link, and the
// time of an exchange there and back, both checked against the expected result first. Times over
// memory say what packing and the second stage cost, not what a slow link saves. Rows are float32.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "all_to_all_exchange.h"
#include "comm/loopback/loopback.h"
#include "comm/traffic.h"
#include "json.h"

namespace {

using namespace fomoe::comm;
using Clock = std::chrono::steady_clock;

std::map<std::string, int64_t> parse(int count, char** texts, bool& as_json) {
  std::map<std::string, int64_t> values = {
      {"--sites", 2}, {"--ranks-per-site", 2}, {"--tokens", 256}, {"--experts", 128},
      {"--top-k", 8}, {"--dim", 1024},         {"--seed", 1},     {"--repeats", 5}};
  for (int i = 1; i < count; ++i) {
    const std::string name = texts[i];
    if (name == "--json") {
      as_json = true;
      continue;
    }
    const auto value = values.find(name);
    if (value == values.end() || i + 1 == count) {
      std::string known;
      for (const auto& [option, standard] : values) {
        known += " " + option + " (" + std::to_string(standard) + ")";
      }
      throw std::invalid_argument("unknown option or no value: " + name + "; options:" + known +
                                  " --json");
    }
    value->second = std::stoll(texts[++i]);
    if (value->second < (name == "--seed" || name == "--tokens" ? 0 : 1)) {
      throw std::invalid_argument(name + " must be positive, got " + texts[i]);
    }
  }
  if (values["--top-k"] > values["--experts"]) {
    throw std::invalid_argument("--top-k must be at most --experts, got " +
                                std::to_string(values["--top-k"]));
  }
  return values;
}

/// K different experts per token, all equally likely; small whole numbers, so that sums are exact.
bench::RankTokens draw(std::map<std::string, int64_t> options, std::mt19937& random) {
  bench::RankTokens tokens = {{}, {}, {}, options["--dim"], options["--top-k"]};
  std::vector<int32_t> experts(options["--experts"]);
  for (size_t e = 0; e < experts.size(); ++e) experts[e] = static_cast<int32_t>(e);
  for (int64_t token = 0; token < options["--tokens"]; ++token) {
    for (int64_t d = 0; d < tokens.width; ++d) tokens.x.push_back(float(random() % 4));
    for (int64_t k = 0; k < tokens.top_k; ++k) {
      std::swap(experts[k], experts[k + random() % (experts.size() - k)]);
      tokens.ids.push_back(experts[k]);
      tokens.weights.push_back(float(k + 1));
    }
  }
  return tokens;
}

using Exchange = std::function<bench::Exchanged(int rank, Transport&)>;

/// Runs the exchange on all ranks at once; returns its seconds, checked against the bytes and,
/// where given, the results that it must have.
double run(Loopback& loopback, const Exchange& exchange, int64_t expected_bytes,
           const std::vector<std::vector<float>>& expected) {
  std::vector<bench::Exchanged> results(expected.size());
  std::vector<std::string> errors(expected.size());
  std::vector<std::thread> threads;
  const Clock::time_point begin = Clock::now();
  for (size_t rank = 0; rank < expected.size(); ++rank) {
    threads.emplace_back([&, rank] {
      Transport& transport = loopback.end(static_cast<int>(rank));
      try {
        results[rank] = exchange(static_cast<int>(rank), transport);
      } catch (const std::exception& error) {
        errors[rank] = error.what();
        transport.abort();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  int64_t sent_bytes = 0;
  for (size_t rank = 0; rank < expected.size(); ++rank) {
    if (!errors[rank].empty()) throw std::runtime_error(errors[rank]);
    if (results[rank].y != expected[rank]) {
      throw std::runtime_error("rank " + std::to_string(rank) + " has a wrong result");
    }
    sent_bytes += results[rank].sent_bytes;
  }
  if (sent_bytes != expected_bytes) {
    throw std::runtime_error("sent " + std::to_string(sent_bytes) + " bytes, planned " +
                             std::to_string(expected_bytes));
  }
  return seconds;
}

int64_t total(const Traffic& traffic) {
  int64_t sum = 0;
  for (const LinkBytes& bytes : {traffic.counts, traffic.dispatch, traffic.combine}) {
    sum += bytes.local + bytes.intra_node + bytes.inter_site;
  }
  return sum;
}

int64_t inter_site(const Traffic& traffic) {
  return traffic.counts.inter_site + traffic.dispatch.inter_site + traffic.combine.inter_site;
}

bench::Json json_of(const Traffic& traffic, const std::vector<double>& seconds) {
  const auto links = [](const LinkBytes& bytes) {
    return bench::Json()
        .add("local", bytes.local)
        .add("intra_node", bytes.intra_node)
        .add("inter_site", bytes.inter_site);
  };
  return bench::Json()
      .add("counts_bytes", links(traffic.counts))
      .add("dispatch_bytes", links(traffic.dispatch))
      .add("combine_bytes", links(traffic.combine))
      .add("seconds", seconds);
}

void measure(std::map<std::string, int64_t> options, bool as_json) {
  const std::vector<int> ranks_per_site(options["--sites"],
                                        static_cast<int>(options["--ranks-per-site"]));
  const int num_ranks = ranks_per_site.front() * static_cast<int>(ranks_per_site.size());
  std::vector<int> owners;
  for (int64_t e = 0; e < options["--experts"]; ++e) {
    owners.push_back(static_cast<int>(e * num_ranks / options["--experts"]));
  }
  const Topology topology(ranks_per_site, owners), one_site({num_ranks}, owners);
  std::mt19937 random(static_cast<uint32_t>(options["--seed"]));
  std::vector<bench::RankTokens> tokens;
  std::vector<std::vector<int32_t>> ids;
  std::vector<std::vector<float>> expected;
  for (int rank = 0; rank < num_ranks; ++rank) {
    tokens.push_back(draw(options, random));
    ids.push_back(tokens.back().ids);
    expected.push_back(bench::expected_result(topology, tokens.back()));
  }
  const RowFormat format = {options["--dim"], 4, 4, options["--top-k"]};
  const auto plans = plan_all_to_all(topology, ids, format.top_k);
  const Traffic two_stages = hierarchical_traffic(topology, plans, format);
  const Traffic flat = flat_traffic(topology, ids, format);
  const int64_t minimum = deduplicated_minimum(plans, format);

  Loopback stages(topology, std::chrono::minutes(1)), world(one_site, std::chrono::minutes(1));
  std::vector<double> two_stages_seconds, flat_seconds;
  for (int64_t repeat = 0; repeat < options["--repeats"]; ++repeat) {
    two_stages_seconds.push_back(run(
        stages,
        [&](int rank, Transport& transport) {
          return bench::exchange_hierarchical(topology, plans[rank], tokens[rank], transport);
        },
        total(two_stages), expected));
    flat_seconds.push_back(run(
        world,
        [&](int rank, Transport& transport) {
          return bench::exchange_flat(topology, tokens[rank], transport);
        },
        total(flat), expected));
  }
  if (as_json) {
    bench::Json result;
    result.add("benchmark", "all_to_all").add("transport", "loopback").add("dtype", "float32");
    for (const auto& [name, value] : options) result.add(name.substr(2).c_str(), value);
    result.add("deduplicated_minimum_bytes", minimum);
    result.add("hierarchical", json_of(two_stages, two_stages_seconds));
    result.add("flat", json_of(flat, flat_seconds));
    std::printf("%s\n", result.text().c_str());
    return;
  }
  std::printf("%-14s %16s %12s %10s\n", "", "inter-site bytes", "of minimum", "best ms");
  const auto print = [&](const char* name, const Traffic& traffic, const auto& seconds) {
    std::printf("%-14s %16lld %12.3f %10.3f\n", name, static_cast<long long>(inter_site(traffic)),
                minimum ? static_cast<double>(inter_site(traffic)) / double(minimum) : 0.0,
                1e3 * *std::min_element(seconds.begin(), seconds.end()));
  };
  print("hierarchical", two_stages, two_stages_seconds);
  print("flat", flat, flat_seconds);
}

}  // namespace

int main(int count, char** texts) {
  try {
    bool as_json = false;
    const auto options = parse(count, texts, as_json);
    measure(options, as_json);
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "bench_all_to_all: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_all_to_all: %s\n", error.what());
    return 1;
  }
  return 0;
}
