// SPDX-License-Identifier: Apache-2.0
#include "cuda/product_cases.h"

namespace {

using namespace product_cases;

const Family kSimple = {
    fomoe::cuda::simple::num_weight_parts,
    [](const RowProduct& product) { fomoe::cuda::simple::multiply(product, nullptr); },
    [](const WeightProduct& product) { fomoe::cuda::simple::multiply(product, nullptr); }};

}  // namespace

TEST(rows_meet_the_matrices_of_their_experts) {
  for (const DType dtype : samples::kAllDTypes) check_all(kSimple, dtype, aligned_row_cases());
}

TEST(rows_of_any_width_and_alignment_meet_the_matrices_of_their_experts) {
  for (const DType dtype : samples::kAllDTypes) check_all(kSimple, dtype, odd_row_cases());
}

TEST(the_rows_of_each_expert_meet_each_other) {
  for (const DType dtype : samples::kAllDTypes) check_all(kSimple, dtype, aligned_weight_cases());
}

TEST(the_rows_of_each_expert_meet_each_other_at_any_width_and_alignment) {
  for (const DType dtype : samples::kAllDTypes) check_all(kSimple, dtype, odd_weight_cases());
}
