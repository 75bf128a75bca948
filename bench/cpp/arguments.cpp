// SPDX-License-Identifier: Apache-2.0
#include "arguments.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <exception>
#include <functional>
#include <map>

namespace bench {
namespace {

using fomoe::DType;
using fomoe::KernelPath;

constexpr int64_t kCpuTokens = 4096;  // enough for a CPU to reach its rates

const std::map<std::string, DType> kDTypes = {{"fp64", DType::kFloat64},
                                              {"fp32", DType::kFloat32},
                                              {"bf16", DType::kBFloat16},
                                              {"fp16", DType::kFloat16}};
const std::map<std::string, std::optional<KernelPath>> kPaths = {{"auto", std::nullopt},
                                                                 {"simple", KernelPath::kSimple},
                                                                 {"sm80", KernelPath::kSm80},
                                                                 {"sm90", KernelPath::kSm90}};

constexpr const char* kHelp =
    "  --device cpu|cuda      where to run; default cuda\n"
    "  --shape NAME           layer, see --list; repeatable; default: the first five\n"
    "  --tokens N             tokens instead of the shape's own; on the CPU at most %lld by "
    "default\n"
    "  --op NAME              measure this only; repeatable; all: %s\n"
    "  --dtype NAME           fp64, fp32, bf16 or fp16; repeatable\n"
    "  --path NAME            matrix kernels: simple, sm80, sm90 or auto; repeatable\n"
    "  --routing NAME         uniform, balanced, zipf, one-hot or empty; default uniform\n"
    "  --zipf-exponent S      of --routing zipf; default 1\n"
    "  --ghost-share X        share of experts that are not here, 0 to 1; default 0\n"
    "  --decode-tokens N      tokens of the op decode; repeatable; default 1, 16, 128\n"
    "  --cold | --warm        whether operands come from memory or from the cache; default cold\n"
    "  --launch graph|stream  CUDA graphs of many calls, or call by call; default graph\n"
    "  --seconds S            for every measurement; default 1; 0: one repetition\n"
    "  --cublas FILE          library of the dense product; default: found by its usual names\n"
    "  --list                 show the shapes\n";

void print_help(const Program& program) {
  std::string ops;
  for (const std::string& op : program.ops) ops += (ops.empty() ? "" : ", ") + op;
  std::printf("%s: %s\nOne JSON object per measurement on standard output.\n\n", program.name,
              program.about);
  std::printf(kHelp, static_cast<long long>(kCpuTokens), ops.c_str());
}

void print_shapes() {
  std::printf("%-20s %6s %6s %6s %5s %3s\n", "name", "T", "H", "I", "E", "K");
  for (const Shape& s : kShapes) {
    std::printf("%-20s %6lld %6lld %6lld %5lld %3lld\n", s.name.c_str(),
                static_cast<long long>(s.tokens), static_cast<long long>(s.dim),
                static_cast<long long>(s.expert_dim), static_cast<long long>(s.num_experts),
                static_cast<long long>(s.top_k));
  }
}

template <typename Number>
Number number_in(const std::string& name, const std::string& text, Number low, Number high,
                 const char* expected) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !(low <= value) ||
      !(value <= high)) {
    throw UsageError(name + ": expected " + expected + ", got '" + text + "'");
  }
  return value;
}

int64_t positive(const std::string& name, const std::string& text) {
  return number_in<int64_t>(name, text, 1, int64_t{1} << 30, "a positive integer up to 2^30");
}

template <typename Value>
const Value& choice(const std::string& name, const std::map<std::string, Value>& choices,
                    const std::string& text) {
  const auto found = choices.find(text);
  if (found != choices.end()) return found->second;
  std::string names;
  for (const auto& [key, value] : choices) names += (names.empty() ? "" : ", ") + key;
  throw UsageError(name + ": expected one of " + names + ", got '" + text + "'");
}

const Shape& shape_named(const std::string& text) {
  const auto found = std::find_if(std::begin(kShapes), std::end(kShapes),
                                  [&](const Shape& shape) { return shape.name == text; });
  if (found == std::end(kShapes)) {
    throw UsageError("--shape: expected a name that --list shows, got '" + text + "'");
  }
  return *found;
}

const std::string& op_named(const Program& program, const std::string& text) {
  const auto found = std::find(program.ops.begin(), program.ops.end(), text);
  if (found == program.ops.end()) {
    throw UsageError("--op: expected one that --help names, got '" + text + "'");
  }
  return *found;
}

using Setter = std::function<void(const std::string& name, const std::string& text)>;

/// Options that take a value. `tokens` and `decode` are collected, to be applied at the end.
std::map<std::string, Setter> setters(const Program& program, Arguments& out,
                                      std::optional<int64_t>& tokens,
                                      std::vector<int64_t>& decode) {
  static const std::map<std::string, std::string> kDevices = {{"cpu", "cpu"}, {"cuda", "cuda"}};
  static const std::map<std::string, bool> kLaunches = {{"graph", true}, {"stream", false}};
  using Text = const std::string&;
  std::map<std::string, Setter> all = {
      {"--device", [&](Text n, Text t) { out.device = choice(n, kDevices, t); }},
      {"--shape", [&](Text, Text t) { out.shapes.push_back(shape_named(t)); }},
      {"--tokens", [&](Text n, Text t) { tokens = positive(n, t); }},
      {"--op", [&](Text, Text t) { out.ops.push_back(op_named(program, t)); }},
      {"--dtype", [&](Text n, Text t) { out.dtypes.push_back(choice(n, kDTypes, t)); }},
      {"--routing", [&](Text n, Text t) { out.routing = choice(n, routing_kinds(), t); }},
      {"--zipf-exponent",
       [&](Text n, Text t) {
         out.zipf_exponent = number_in(n, t, 0.0, 100.0, "a number from 0 to 100");
       }},
      {"--ghost-share",
       [&](Text n, Text t) {
         out.ghost_share = number_in(n, t, 0.0, 1.0, "a number from 0 to 1");
       }},
      {"--decode-tokens", [&](Text n, Text t) { decode.push_back(positive(n, t)); }},
      {"--launch", [&](Text n, Text t) { out.graph = choice(n, kLaunches, t); }},
      {"--seconds",
       [&](Text n, Text t) { out.seconds = number_in(n, t, 0.0, 1e6, "a number from 0 to 1e6"); }},
      {"--cublas", [&](Text, Text t) { out.cublas = t; }},
  };
  if (program.has_products) {
    all["--path"] = [&](Text n, Text t) { out.paths.push_back(choice(n, kPaths, t)); };
  }
  return all;
}

void apply_defaults(const Program& program, const std::optional<int64_t>& tokens,
                    Arguments& arguments) {
  if (program.has_products && arguments.device == "cpu") {
    throw UsageError(
        "--device: expected cuda, got cpu: on the CPU, matrix products are torch's; `fomoe bench` "
        "times them");
  }
  if (arguments.shapes.empty()) {
    arguments.shapes.assign(std::begin(kShapes), std::begin(kShapes) + kNumDefaultShapes);
  }
  for (Shape& shape : arguments.shapes) {
    if (tokens) {
      shape.tokens = *tokens;
    } else if (arguments.device == "cpu") {
      shape.tokens = std::min(shape.tokens, kCpuTokens);
    }
    if (shape.num_rows() >= int64_t{1} << 31) {
      throw UsageError("--tokens: expected fewer than 2^31 rows in all, got " +
                       std::to_string(shape.tokens) + " tokens for " + shape.name);
    }
    check_routing(arguments.routing, shape.num_experts, shape.top_k);
  }
  if (arguments.dtypes.empty()) arguments.dtypes = program.dtypes;
  if (arguments.ops.empty()) arguments.ops = program.ops;
  if (arguments.paths.empty()) arguments.paths = {std::nullopt};
}

}  // namespace

const char* name_of(DType dtype) {
  for (const auto& [name, value] : kDTypes) {
    if (value == dtype) return name.c_str();
  }
  return "";
}

Arguments parse_arguments(const Program& program, int count, const char* const* texts) {
  Arguments arguments;
  std::optional<int64_t> tokens;
  std::vector<int64_t> decode;
  const auto options = setters(program, arguments, tokens, decode);
  for (int i = 1; i < count; ++i) {
    const std::string name = texts[i];
    if (name == "--help" || name == "--list") {
      name == "--help" ? print_help(program) : print_shapes();
      arguments.is_done = true;
      return arguments;
    }
    if (name == "--cold" || name == "--warm") {
      arguments.cold = name == "--cold";
      continue;
    }
    const auto option = options.find(name);
    if (option == options.end()) throw UsageError(name + ": no such option, see --help");
    if (++i == count) throw UsageError(name + ": expected a value after it");
    option->second(name, texts[i]);
  }
  if (!decode.empty()) arguments.decode_tokens = decode;
  apply_defaults(program, tokens, arguments);
  return arguments;
}

int run_program(const Program& program, int count, const char* const* texts,
                void (*measure)(const Program&, const Arguments&)) {
  try {
    const Arguments arguments = parse_arguments(program, count, texts);
    if (!arguments.is_done) measure(program, arguments);
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}

}  // namespace bench
