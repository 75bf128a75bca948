// SPDX-License-Identifier: Apache-2.0
#include "fomoe/permute.h"

#include "harness.h"

int main() {
  const int64_t tokens = 4096, top_k = 8, experts = 64;
  for (bench::DType dtype : {bench::DType::kFloat32, bench::DType::kBFloat16}) {
    for (int64_t width : {512, 2048}) {
      const bench::UniformRouting routing(tokens, top_k, experts);
      const std::vector<char> x = bench::random_array(dtype, tokens * width);
      std::vector<char> rows(tokens * top_k * width * fomoe::size_of(dtype));
      const int64_t bytes = static_cast<int64_t>(x.size() + rows.size());
      bench::measure(
          {"permute", bench::shape({{"T", tokens}, {"K", top_k}, {"D", width}}), dtype, bytes},
          [&] { fomoe::cpu::permute(dtype, x.data(), routing.view, width, rows.data()); });
    }
  }
}
