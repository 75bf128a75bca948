// SPDX-License-Identifier: Apache-2.0
#include "cuda/tensor_map.h"

#include <cstring>

#include "cuda/device.cuh"

#ifndef FOMOE_EMULATION
#include <cuda.h>
#endif

namespace fomoe::cuda {

#ifdef FOMOE_EMULATION

TensorMap make_tensor_map(DType, const void* data, std::initializer_list<Dimension> dimensions) {
  emulation::BoxedArray array = {};
  array.data = const_cast<void*>(data);
  for (const Dimension& d : dimensions) {
    array.extents[array.rank] = d.extent;
    array.strides[array.rank] = d.stride;
    array.box[array.rank] = d.box;
    ++array.rank;
  }
  emulation::check_array(array);
  TensorMap map = {};
  static_assert(sizeof(array) <= sizeof(map));
  std::memcpy(&map, &array, sizeof(array));
  return map;
}

#else

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

/// From the driver that the runtime has loaded, so that nothing links libcuda.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &result),
        "cuTensorMapEncodeTiled");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result),
        "cuTensorMapEncodeTiled");
#endif
  if (result != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("fomoe: the driver has no cuTensorMapEncodeTiled (CUDA 12.0)");
  }
  return reinterpret_cast<Encode>(function);
}

}  // namespace

TensorMap make_tensor_map(DType dtype, const void* data,
                          std::initializer_list<Dimension> dimensions) {
  static const Encode encode = find_encode();
  cuuint64_t extents[5], strides[5];
  cuuint32_t box[5], steps[5];
  cuuint32_t rank = 0;
  for (const Dimension& d : dimensions) {
    extents[rank] = static_cast<cuuint64_t>(d.extent);
    if (rank > 0) strides[rank - 1] = static_cast<cuuint64_t>(d.stride * size_of(dtype));
    box[rank] = static_cast<cuuint32_t>(d.box);
    steps[rank++] = 1;
  }
  alignas(64) CUtensorMap map;
  const CUresult status =
      encode(&map,
             dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             rank, const_cast<void*>(data), extents, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("fomoe: cuTensorMapEncodeTiled refuses an array: error " +
                             std::to_string(static_cast<int>(status)));
  }
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  TensorMap result;
  std::memcpy(&result, &map, sizeof(map));
  return result;
}

#endif

}  // namespace fomoe::cuda
