// SPDX-License-Identifier: Apache-2.0
#include "grouped_gemm/sm80_rows.cuh"

namespace fomoe::cuda::sm80 {

void multiply_and_activate_backward(const RowProduct& product, Stream stream) {
  launch_row_product<Epilogue::kActivateBackward>("sm80_row_backward", product, stream);
}

}  // namespace fomoe::cuda::sm80
