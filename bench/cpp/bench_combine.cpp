// SPDX-License-Identifier: Apache-2.0
#include "fomoe/combine.h"

#include "harness.h"

int main() {
  const int64_t tokens = 4096, top_k = 8, experts = 64;
  for (bench::DType dtype : {bench::DType::kFloat32, bench::DType::kBFloat16}) {
    for (int64_t width : {512, 2048}) {
      const bench::UniformRouting routing(tokens, top_k, experts);
      const std::vector<char> rows = bench::random_array(dtype, tokens * top_k * width);
      const std::vector<char> weights = bench::random_array(bench::DType::kFloat32, tokens * top_k);
      const std::vector<char> grad_y = bench::random_array(dtype, tokens * width);
      std::vector<char> y(grad_y.size()), d_rows(rows.size()), d_weights(weights.size());
      const std::string shape = bench::shape({{"T", tokens}, {"K", top_k}, {"D", width}});
      const auto bytes = [](auto... arrays) { return static_cast<int64_t>((arrays + ...)); };
      bench::measure({"combine", shape, dtype, bytes(rows.size(), weights.size(), y.size())}, [&] {
        fomoe::cpu::combine(dtype, rows.data(), weights.data(), routing.view, width, y.data());
      });
      bench::measure({"combine_backward", shape, dtype,
                      bytes(grad_y.size(), rows.size(), d_rows.size(), d_weights.size())},
                     [&] {
                       fomoe::cpu::combine_backward(dtype, grad_y.data(), rows.data(),
                                                    weights.data(), routing.view, width,
                                                    d_rows.data(), d_weights.data());
                     });
    }
  }
}
