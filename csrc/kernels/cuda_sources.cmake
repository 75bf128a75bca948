# SPDX-License-Identifier: Apache-2.0
# Every CUDA source, relative to csrc/kernels: once for nvcc, once for the emulation on the CPU.
set(FOMOE_CUDA_PORTABLE_SOURCES  # sm_80 code and PTX, and code for sm_90a
  combine/combine_cuda.cu
  destinations/destinations_cuda.cu
  expert_mlp/bias_cuda.cu
  expert_mlp/decode_cuda.cu
  expert_mlp/expert_mlp_cuda.cu
  grouped_gemm/grouped_gemm_cuda.cu
  grouped_gemm/products.cu
  grouped_gemm/row_tiles.cu
  grouped_gemm/simple.cu
  permute/permute_cuda.cu
  route/route_cuda.cu
  topk_gate/topk_gate_backward_cuda.cu
  topk_gate/topk_gate_cuda.cu)
set(FOMOE_CUDA_SM80_SOURCES      # sm_80 code and PTX only: Hopper has kernels of its own
  grouped_gemm/sm80_products.cu
  grouped_gemm/sm80_rows_activate.cu
  grouped_gemm/sm80_rows_backward.cu
  grouped_gemm/sm80_rows_store.cu)
set(FOMOE_CUDA_SM90_SOURCES      # sm_90a code only: wgmma, TMA
  cuda/tensor_map.cu
  grouped_gemm/sm90_products.cu
  grouped_gemm/sm90_row_activate.cu
  grouped_gemm/sm90_row_backward.cu
  grouped_gemm/sm90_row_store.cu
  grouped_gemm/sm90_weight_product.cu)
