// SPDX-License-Identifier: Apache-2.0
#include "cuda/product_cases.h"

namespace {

using namespace product_cases;

const Family kSm90 = {
    fomoe::cuda::sm90::num_weight_parts,
    [](const RowProduct& product) { fomoe::cuda::sm90::multiply(product, nullptr); },
    [](const WeightProduct& product) { fomoe::cuda::sm90::multiply(product, nullptr); }};

constexpr DType kTypes[] = {DType::kBFloat16, DType::kFloat16};

}  // namespace

TEST(rows_meet_the_matrices_of_their_experts) {
  for (const DType dtype : kTypes) check_all(kSm90, dtype, aligned_row_cases());
}

TEST(the_rows_of_each_expert_meet_each_other) {
  for (const DType dtype : kTypes) check_all(kSm90, dtype, aligned_weight_cases());
}
