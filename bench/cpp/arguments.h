// SPDX-License-Identifier: Apache-2.0
// The command line that all benchmarks share.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "fomoe/dtype.h"
#include "fomoe/kernel_path.h"
#include "routings.h"
#include "shapes.h"

namespace bench {

/// A mistake on the command line, or a device that is not there: exit status 2.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Arguments {
  std::string device = "cuda";
  std::vector<Shape> shapes;  // with --tokens applied
  std::vector<fomoe::DType> dtypes;
  std::vector<std::string> ops;                         // those of the program that were asked for
  std::vector<std::optional<fomoe::KernelPath>> paths;  // nullopt: as choose_path decides
  RoutingKind routing = RoutingKind::kUniform;
  double zipf_exponent = 1.0;
  double ghost_share = 0.0;
  std::vector<int64_t> decode_tokens = {1, 16, 128};
  bool cold = true;
  bool graph = true;
  double seconds = 1.0;
  std::string cublas;    // file; empty: by its usual names
  bool is_done = false;  // --help or --list was printed
};

/// What a program measures.
struct Program {
  const char* name;
  const char* about;
  std::vector<std::string> ops;
  std::vector<fomoe::DType> dtypes;  // by default
  bool has_products;                 // matrix products: on GPUs only, by several paths
};

Arguments parse_arguments(const Program& program, int count, const char* const* texts);

const char* name_of(fomoe::DType dtype);

/// Runs a benchmark: 0, or 2 after a mistake on the command line, or 1 after another error; errors
/// are one line on standard error.
int run_program(const Program& program, int count, const char* const* texts,
                void (*measure)(const Program&, const Arguments&));

}  // namespace bench
