// SPDX-License-Identifier: Apache-2.0
// What the benchmarks count, draw and parse. No test here looks at a clock.
#include <algorithm>
#include <set>

#include "../../bench/cpp/arguments.h"
#include "../../bench/cpp/device_cpu.h"
#include "../../bench/cpp/expert_mlp_arrays.h"
#include "../../bench/cpp/measure.h"
#include "harness.h"

namespace {

using bench::HostRouting;
using bench::RoutingKind;

const bench::Program kProgram = {
    "bench_it", "it", {"forward", "backward"}, {fomoe::DType::kBFloat16}, true};

bench::Arguments parse(std::vector<const char*> texts, const bench::Program& program = kProgram) {
  texts.insert(texts.begin(), program.name);
  return bench::parse_arguments(program, static_cast<int>(texts.size()), texts.data());
}

std::string mistake_in(const std::vector<const char*>& texts) {
  try {
    parse(texts);
  } catch (const bench::UsageError& error) {
    return error.what();
  }
  return "none";
}

HostRouting draw(RoutingKind kind, int64_t tokens, int64_t top_k, int64_t experts,
                 double ghost_share = 0, double exponent = 1) {
  return HostRouting(bench::draw_ids(kind, exponent, tokens, top_k, experts),
                     bench::map_experts(experts, ghost_share), tokens, top_k);
}

std::vector<int32_t> counts_of(const HostRouting& routing) {
  std::vector<int32_t> counts;
  for (size_t e = 0; e + 1 < routing.offsets.size(); ++e) {
    counts.push_back(routing.offsets[e + 1] - routing.offsets[e]);
  }
  return counts;
}

class Counter : public bench::Stopwatch {
 public:
  double run() override { return ++runs; }
  int calls() const override { return 1; }
  int runs = 0;
};

}  // namespace

TEST(without_options_the_first_five_shapes_are_measured_cold_on_the_gpu) {
  const bench::Arguments arguments = parse({});
  CHECK(arguments.device == "cuda" && arguments.cold && arguments.graph);
  CHECK(arguments.shapes.size() == 5);
  CHECK(arguments.shapes[0].name == "qwen3-30b" && arguments.shapes[0].num_rows() == 262144);
  CHECK(arguments.ops == kProgram.ops);
  CHECK(arguments.dtypes == kProgram.dtypes);
  CHECK(arguments.paths.size() == 1 && !arguments.paths[0]);
}

TEST(options_are_taken) {
  const bench::Arguments arguments =
      parse({"--shape", "olmoe",           "--shape", "tiny",          "--tokens", "7",
             "--op",    "backward",        "--path",  "sm80",          "--path",   "auto",
             "--warm",  "--launch",        "stream",  "--seconds",     "0.5",      "--routing",
             "zipf",    "--zipf-exponent", "1.5",     "--ghost-share", "0.25",     "--dtype",
             "fp16",    "--decode-tokens", "3"});
  CHECK(arguments.shapes.size() == 2);
  CHECK(arguments.shapes[0].tokens == 7 && arguments.shapes[1].tokens == 7);
  CHECK(arguments.ops == std::vector<std::string>{"backward"});
  CHECK(arguments.paths.size() == 2 && arguments.paths[0] == fomoe::KernelPath::kSm80);
  CHECK(!arguments.cold && !arguments.graph && arguments.seconds == 0.5);
  CHECK(arguments.routing == RoutingKind::kZipf && arguments.zipf_exponent == 1.5);
  CHECK(arguments.ghost_share == 0.25);
  CHECK(arguments.decode_tokens == std::vector<int64_t>{3});
}

TEST(a_mistake_is_named) {
  CHECK(mistake_in({"--shape", "huge"}) ==
        "--shape: expected a name that --list shows, got 'huge'");
  CHECK(mistake_in({"--tokens", "0"}) ==
        "--tokens: expected a positive integer up to 2^30, got '0'");
  CHECK(mistake_in({"--tokens", "5x"}).starts_with("--tokens: expected"));
  CHECK(mistake_in({"--tokens"}) == "--tokens: expected a value after it");
  CHECK(mistake_in({"--ghost-share", "1.1"}).starts_with("--ghost-share: expected a number from"));
  CHECK(mistake_in({"--seconds", "nan"}).starts_with("--seconds: expected a number from"));
  CHECK(mistake_in({"--dtype", "int8"}) ==
        "--dtype: expected one of bf16, fp16, fp32, fp64, got 'int8'");
  CHECK(mistake_in({"--op", "sideways"}).starts_with("--op: expected"));
  CHECK(mistake_in({"--fast"}) == "--fast: no such option, see --help");
  CHECK(mistake_in({"--device", "cpu"}).starts_with("--device: expected cuda, got cpu"));
  CHECK(mistake_in({"--shape", "deepseek-v3", "--tokens", "1073741824"})
            .starts_with("--tokens: expected fewer than 2^31 rows"));
}

TEST(a_cpu_gets_fewer_tokens_unless_they_are_named) {
  bench::Program program = kProgram;
  program.has_products = false;
  CHECK(parse({"--device", "cpu"}, program).shapes[0].tokens == 4096);
  CHECK(parse({"--device", "cpu", "--tokens", "9999"}, program).shapes[0].tokens == 9999);
}

TEST(balanced_routing_gives_every_expert_as_much) {
  for (const int32_t count : counts_of(draw(RoutingKind::kBalanced, 50, 3, 8))) {
    CHECK(count == 150 / 8 || count == 150 / 8 + 1);
  }
}

TEST(one_hot_routing_gives_one_expert_everything) {
  const HostRouting routing = draw(RoutingKind::kOneHot, 50, 3, 8);
  CHECK(routing.num_active_experts() == 1);
  CHECK(routing.num_executed_rows() == 150);
}

TEST(empty_routing_leaves_half_of_the_experts_without_rows) {
  CHECK(draw(RoutingKind::kEmpty, 200, 2, 8).num_active_experts() == 4);
  CHECK(mistake_in({"--routing", "empty", "--shape", "tiny"}) == "none");
}

TEST(zipf_routing_prefers_the_first_experts_the_more_the_larger_the_exponent) {
  const auto one = counts_of(draw(RoutingKind::kZipf, 2000, 1, 4, 0, 1.0));
  // Weights 1, 1/2, 1/3, 1/4 of 25/12: 960, 480, 320, 240.
  CHECK(std::abs(one[0] - 960) < 100 && std::abs(one[3] - 240) < 75);
  const auto three = counts_of(draw(RoutingKind::kZipf, 2000, 1, 4, 0, 3.0));
  CHECK(three[0] > 1600);
  const auto none = counts_of(draw(RoutingKind::kZipf, 2000, 1, 4, 0, 0.0));
  CHECK(std::abs(none[0] - 500) < 100);
}

TEST(a_token_gets_different_experts) {
  for (const RoutingKind kind :
       {RoutingKind::kUniform, RoutingKind::kBalanced, RoutingKind::kZipf, RoutingKind::kEmpty}) {
    const std::vector<int32_t> ids = bench::draw_ids(kind, 2.0, 100, 4, 9);
    for (size_t slot = 0; slot < ids.size(); slot += 4) {
      CHECK(std::set<int32_t>(ids.begin() + slot, ids.begin() + slot + 4).size() == 4);
    }
  }
}

TEST(ghosts_are_spread_evenly_and_their_rows_are_skipped) {
  CHECK(bench::map_experts(6, 0.5) == (std::vector<int32_t>{0, -1, 1, -1, 2, -1}));
  CHECK(bench::map_experts(4, 0.25) == (std::vector<int32_t>{0, 1, 2, -1}));
  CHECK(draw(RoutingKind::kBalanced, 40, 2, 8, 0.75).num_executed_rows() == 20);
  CHECK(draw(RoutingKind::kBalanced, 40, 2, 8, 1.0).num_local_experts() == 0);
}

TEST(a_spread_is_the_quartiles_the_median_and_the_best) {
  const bench::Spread numbers = bench::spread({3, 1, 10, 2, 4});
  CHECK(numbers.low == 2 && numbers.median == 3 && numbers.high == 4 && numbers.best == 1);
  const bench::Spread two = bench::spread({2, 4});
  CHECK(two.low == 2.5 && two.median == 3 && two.high == 3.5);
}

TEST(a_ratio_is_taken_within_repetitions) {
  CHECK(bench::paired_ratio({2, 4, 40}, {1, 2, 20}).median == 2);
  CHECK(bench::paired_ratio({3, 6, 2}, {1, 3, 4}).median == 2);
}

TEST(stopwatches_run_equally_often) {
  Counter a, b, c;
  const auto times = bench::interleave({&a, &b, &c}, 1e-9);
  CHECK(a.runs == 10 && b.runs == 10 && c.runs == 10);
  CHECK(times.size() == 3 && times[1].size() == 10);
  CHECK(bench::interleave({&a, &b}, 0)[1].size() == 1);
}

TEST(an_object_is_one_line_of_json) {
  const bench::Json inner = bench::Json().add("n", 3);
  bench::Json line;
  line.add("text", "a \"b\"").add("x", 2.5).add("none", NAN).add("list", {1.0, 2.0});
  line.add("inner", inner).add_null("null").add("yes", true);
  CHECK(line.text() ==
        "{\"text\": \"a \\\"b\\\"\", \"x\": 2.5, \"none\": null, \"list\": [1, 2], "
        "\"inner\": {\"n\": 3}, \"null\": null, \"yes\": true}");
}

TEST(random_arrays_are_normal_throughout) {
  bench::CpuDevice device;
  const int64_t count = 2500000;  // more than one period
  const bench::Memory memory = bench::random_array(device, fomoe::DType::kFloat32, count, 2.0);
  const float* values = static_cast<const float*>(memory.data());
  double sum = 0, squares = 0;
  for (int64_t i = count - 1000000; i < count; ++i) {
    sum += values[i];
    squares += values[i] * values[i];
  }
  CHECK(std::abs(sum / 1e6) < 0.01);
  CHECK(std::abs(squares / 1e6 - 4) < 0.05);
}

TEST(expert_traffic_by_hand) {
  bench::Shape shape = {"hand", 4, 10, 6, 2, 1};  // 4 tokens, 4 rows, H 10, I 6, 2 experts
  const HostRouting routing = draw(RoutingKind::kBalanced, 4, 1, 2);
  const bench::ExpertTraffic traffic(shape, fomoe::DType::kBFloat16, routing);
  CHECK(traffic.flops() == 6 * 4 * 10 * 6);
  // Weights 3*2*10*6, x 40, pre 4*12, hidden written and read 2*4*6, out written and read 2*40,
  // y 40; 8 bytes of index and weight per row.
  CHECK(traffic.forward(true) == 2 * (360 + 40 + 48 + 48 + 80 + 40) + 8 * 4);
  CHECK(traffic.forward(true) - traffic.forward(false) == 2 * 48);
  // Weights read and their gradients written 2*360; grad_y and x 40 each for both uses of grad_y,
  // pre read, d_pre written and read twice, hidden written and read, rows written and read, d_x.
  CHECK(traffic.backward() == 2 * (720 + 3 * 40 + 4 * 48 + 2 * 24 + 80 + 40) + 8 * 4);
}
