// SPDX-License-Identifier: Apache-2.0
// The schemas of torch.ops.fomoe, all in one place; each op's file registers its implementation.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fomoe, m) {
  m.def("permute(Tensor x, Tensor slot_to_row, Tensor row_to_slot, Tensor offsets) -> Tensor");
}
