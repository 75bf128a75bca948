// SPDX-License-Identifier: Apache-2.0
// The two-stage all-to-all against the flat one: bytes by link, and the time of an exchange there
// and back, both checked against the expected result first. Rows are float32.
//
// Over loopback all ranks are threads of this process: times over memory say what packing and the
// second stage cost, not what a slow link saves. Over NCCL every rank is a process with a card:
//   bench_all_to_all --transport nccl --id-file /shared/id --rank R --sites 2 --ranks-per-site 8
// Rank 0 writes the file, which must not exist yet, and removes it at the end.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>

#include "all_to_all_runs.h"
#include "json.h"

namespace {

using namespace fomoe::comm;
using bench::AllToAllCase;
using bench::AllToAllSeconds;

constexpr std::chrono::seconds kTimeout{60};

struct Options {
  std::map<std::string, int64_t> numbers = {
      {"--sites", 2},     {"--ranks-per-site", 2}, {"--tokens", 256},
      {"--experts", 128}, {"--top-k", 8},          {"--dim", 1024},
      {"--seed", 1},      {"--repeats", 5},        {"--rank", 0}};
  std::map<std::string, std::string> texts = {
      {"--transport", "loopback"}, {"--id-file", ""}, {"--nccl", ""}};
  bool as_json = false;
};

[[noreturn]] void refuse(const Options& options, const std::string& argument) {
  std::string known;
  for (const auto& [name, value] : options.numbers) known += " " + name;
  for (const auto& [name, value] : options.texts) known += " " + name;
  throw std::invalid_argument("unknown option or no value: " + argument + "; options:" + known +
                              " --json");
}

void require_sense(const Options& options) {
  const auto number = [&](const char* name) { return options.numbers.at(name); };
  if (number("--top-k") > number("--experts")) {
    throw std::invalid_argument("--top-k must be at most --experts, got " +
                                std::to_string(number("--top-k")));
  }
  const int64_t num_ranks = number("--sites") * number("--ranks-per-site");
  if (number("--rank") >= num_ranks) {
    throw std::invalid_argument("--rank must be below " + std::to_string(num_ranks) + ", got " +
                                std::to_string(number("--rank")));
  }
  const std::string& transport = options.texts.at("--transport");
  if (transport != "loopback" && transport != "nccl") {
    throw std::invalid_argument("--transport must be loopback or nccl, got " + transport);
  }
  if (transport == "nccl" && options.texts.at("--id-file").empty()) {
    throw std::invalid_argument("--transport nccl needs --id-file, the same for all ranks");
  }
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    if (name == "--json") {
      options.as_json = true;
      continue;
    }
    if (i + 1 == count) refuse(options, name);
    if (const auto text = options.texts.find(name); text != options.texts.end()) {
      text->second = arguments[++i];
      continue;
    }
    const auto number = options.numbers.find(name);
    if (number == options.numbers.end()) refuse(options, name);
    number->second = std::stoll(arguments[++i]);
    const bool may_be_zero = name == "--seed" || name == "--tokens" || name == "--rank";
    if (number->second < (may_be_zero ? 0 : 1)) {
      throw std::invalid_argument(name + " must be positive, got " + arguments[i]);
    }
  }
  require_sense(options);
  return options;
}

struct Ids {
  nccl::UniqueId sites, flat;
};

/// Rank 0 writes the ids, the others wait for them.
Ids agree_on_ids(const std::string& path, int rank, const nccl::Library& library) {
  namespace files = std::filesystem;
  Ids ids;
  if (rank == 0) {
    if (files::exists(path)) throw std::invalid_argument("--id-file exists already: " + path);
    library.get_unique_id(&ids.sites);
    library.get_unique_id(&ids.flat);
    std::ofstream(path + ".new", std::ios::binary)
        .write(reinterpret_cast<const char*>(&ids), sizeof ids);
    files::rename(path + ".new", path);
    return ids;
  }
  const auto deadline = std::chrono::steady_clock::now() + kTimeout;
  while (!files::exists(path)) {
    if (std::chrono::steady_clock::now() > deadline) {
      throw std::runtime_error("rank 0 did not write " + path);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  std::ifstream file(path, std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(&ids), sizeof ids)) {
    throw std::runtime_error("cannot read the ids of rank 0 from " + path);
  }
  return ids;
}

AllToAllSeconds run_over_nccl(const AllToAllCase& all_to_all, const Options& options) {
  const auto library = nccl::Library::open(options.texts.at("--nccl"));
  nccl::check_cuda_device();
  const std::string& path = options.texts.at("--id-file");
  const int rank = static_cast<int>(options.numbers.at("--rank"));
  const Ids ids = agree_on_ids(path, rank, *library);
  const std::vector<int> sites(options.numbers.at("--sites"),
                               static_cast<int>(options.numbers.at("--ranks-per-site")));
  const auto device = nccl::cuda_device();
  nccl::NcclTransport two_stages(library, nccl::cuda_device(), {sites, rank, ids.sites, kTimeout});
  nccl::NcclTransport flat(library, nccl::cuda_device(),
                           {{all_to_all.topology.num_ranks()}, rank, ids.flat, kTimeout});
  if (rank == 0) std::filesystem::remove(path);
  return run_over_nccl(all_to_all, options.numbers.at("--repeats"), {two_stages, flat}, *device);
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

void print(const Options& options, const AllToAllCase& all_to_all, const AllToAllSeconds& seconds) {
  if (options.as_json) {
    bench::Json result;
    result.add("benchmark", "all_to_all");
    result.add("transport", options.texts.at("--transport")).add("dtype", "float32");
    for (const auto& [name, value] : options.numbers) result.add(name.substr(2).c_str(), value);
    result.add("deduplicated_minimum_bytes", all_to_all.deduplicated_minimum);
    result.add("hierarchical", json_of(all_to_all.two_stages, seconds.two_stages));
    result.add("flat", json_of(all_to_all.flat, seconds.flat));
    std::printf("%s\n", result.text().c_str());
    return;
  }
  const int64_t minimum = all_to_all.deduplicated_minimum;
  std::printf("%-14s %16s %12s %10s\n", "", "inter-site bytes", "of minimum", "best ms");
  const auto line = [&](const char* name, const Traffic& traffic, const auto& times) {
    std::printf("%-14s %16lld %12.3f %10.3f\n", name, static_cast<long long>(inter_site(traffic)),
                minimum ? static_cast<double>(inter_site(traffic)) / double(minimum) : 0.0,
                1e3 * *std::min_element(times.begin(), times.end()));
  };
  line("hierarchical", all_to_all.two_stages, seconds.two_stages);
  line("flat", all_to_all.flat, seconds.flat);
}

void measure(const Options& options) {
  const auto number = [&](const char* name) { return options.numbers.at(name); };
  const AllToAllCase all_to_all({number("--sites"), number("--ranks-per-site"), number("--tokens"),
                                 number("--experts"), number("--top-k"), number("--dim"),
                                 number("--seed")});
  const bool over_nccl = options.texts.at("--transport") == "nccl";
  const AllToAllSeconds seconds = over_nccl ? run_over_nccl(all_to_all, options)
                                            : run_over_loopback(all_to_all, number("--repeats"));
  if (number("--rank") == 0) print(options, all_to_all, seconds);
}

}  // namespace

int main(int count, char** texts) {
  try {
    measure(parse(count, texts));
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "bench_all_to_all: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_all_to_all: %s\n", error.what());
    return 1;
  }
  return 0;
}
