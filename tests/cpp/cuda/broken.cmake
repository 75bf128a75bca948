# SPDX-License-Identifier: Apache-2.0
# Kernels broken on purpose: each must make a test of the kernel fail.
#
# A mutant is a copy of one file in which one piece of text was replaced. The test's object is
# linked with the mutant ahead of the library of the right kernels, so that one file is compiled.

# NAME [KERNEL <.cu, if FILE is a header of it>] FILE <in csrc/kernels> TEST <target>
# REPLACE <text that occurs once> [BY <text>]
# [SANITIZED: the mutant reads or writes outside of its arrays]
function(fomoe_broken_kernel name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "SANITIZED" "FILE;KERNEL;TEST;REPLACE;BY" "")
  if(NOT arg_KERNEL)
    set(arg_KERNEL ${arg_FILE})
  endif()
  set(kernels ${PROJECT_SOURCE_DIR}/csrc/kernels)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/broken/${name})

  file(READ ${kernels}/${arg_FILE} text)
  string(FIND "${text}" "${arg_REPLACE}" first)
  string(FIND "${text}" "${arg_REPLACE}" last REVERSE)
  if(first EQUAL -1 OR NOT first EQUAL last)
    message(WARNING "${name}: the text to replace must occur once in ${arg_FILE}")
    add_test(NAME ${name} COMMAND ${CMAKE_COMMAND} -E false)
    return()
  endif()
  string(REPLACE "${arg_REPLACE}" "${arg_BY}" text "${text}")
  file(CONFIGURE OUTPUT ${folder}/${arg_FILE} CONTENT "${text}" @ONLY)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${kernels}/${arg_FILE})
  if(NOT arg_KERNEL STREQUAL arg_FILE)
    file(COPY_FILE ${kernels}/${arg_KERNEL} ${folder}/${arg_KERNEL} ONLY_IF_DIFFERENT)
  endif()

  set_source_files_properties(${folder}/${arg_KERNEL} PROPERTIES LANGUAGE CXX
    COMPILE_OPTIONS "${FOMOE_EMULATED_OPTIONS};-w")
  add_library(${name}_kernel OBJECT ${folder}/${arg_KERNEL})
  target_include_directories(${name}_kernel PRIVATE
    ${folder} ${kernels} ${PROJECT_SOURCE_DIR}/csrc/emulation ${PROJECT_SOURCE_DIR}/csrc/include)
  target_link_libraries(${name}_kernel PRIVATE fomoe_flags)
  if(NOT arg_SANITIZED)  # faster to compile
    target_compile_options(${name}_kernel PRIVATE -fno-sanitize=all -g0)
  endif()
  add_executable(${name} $<TARGET_OBJECTS:${name}_kernel> $<TARGET_OBJECTS:${arg_TEST}>)
  target_link_libraries(${name} PRIVATE fomoe_cuda_tests fomoe_test_main)
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT 60
    PASS_REGULAR_EXPRESSION "FAIL ;ERROR: AddressSanitizer")
endfunction()

fomoe_broken_kernel(broken_permute_without_zeroing
  FILE permute/permute_cuda.cu TEST test_permute_cuda
  REPLACE "executed > first_slot ? executed :" BY "executed > first_slot ? executed + 1 :")
fomoe_broken_kernel(broken_permute_that_reads_again
  FILE permute/permute_cuda.cu TEST test_permute_cuda
  REPLACE "store_global(rows + row * packets + i, value)"
  BY "store_global(rows + row * packets + i, load_global_once(x + token * packets + i))")
fomoe_broken_kernel(broken_route_without_barrier_before_counting
  FILE route/route_cuda.cu TEST test_route_cuda
  REPLACE "counts[e] = 0;\n  __syncthreads();" BY "counts[e] = 0;")
fomoe_broken_kernel(broken_route_without_barrier_before_summing
  FILE route/route_cuda.cu TEST test_route_cuda
  REPLACE "warp_sums[warp] = inclusive;\n  __syncthreads();"
  BY "warp_sums[warp] = inclusive;")
fomoe_broken_kernel(broken_sm80_stage_that_is_refilled_while_it_is_read
  FILE grouped_gemm/sm80_tile.cuh KERNEL grouped_gemm/sm80_rows_store.cu TEST test_sm80_products
  REPLACE "    cp_async_wait<kStages - 2>();\n    __syncthreads();\n    // Past"
  BY "    cp_async_wait<kStages - 2>();\n    // Past")
fomoe_broken_kernel(broken_combine_without_barrier
  FILE combine/combine_cuda.cu TEST test_combine_cuda
  REPLACE "__syncthreads();\n\n    if (has_token" BY "if (has_token")
fomoe_broken_kernel(broken_row_tiles_without_bound SANITIZED
  FILE grouped_gemm/row_tiles.cu TEST test_row_tiles
  REPLACE " && listed + tile < most" BY " && true")
fomoe_broken_kernel(broken_sm80_without_swizzle
  FILE grouped_gemm/sm80_tile.cuh KERNEL grouped_gemm/sm80_rows_store.cu TEST test_sm80_products
  REPLACE "line * kLineChunks + (chunk ^ mask)" BY "line * kLineChunks + chunk")
fomoe_broken_kernel(broken_sm90_with_the_wrong_parity
  FILE grouped_gemm/sm90_pipeline.cuh KERNEL grouped_gemm/sm90_weight_product.cu
  TEST test_sm90_products
  REPLACE "wait(pipeline.full[turn.stage], turn.parity)"
  BY "wait(pipeline.full[turn.stage], turn.parity ^ 1)")
fomoe_broken_kernel(broken_sm90_without_proxy_fence
  FILE grouped_gemm/sm90_pipeline.cuh KERNEL grouped_gemm/sm90_weight_product.cu
  TEST test_sm90_products
  REPLACE "if (k >= first_copied) fence_async_proxy();")
fomoe_broken_kernel(broken_sm90_stage_that_is_released_early
  FILE grouped_gemm/sm90_pipeline.cuh KERNEL grouped_gemm/sm90_weight_product.cu
  TEST test_sm90_products
  REPLACE "wgmma_wait<1>()" BY "wgmma_wait<2>()")
fomoe_broken_kernel(broken_sm90_without_zeros_past_the_rows
  FILE grouped_gemm/sm90_weight_product.cu TEST test_sm90_products
  REPLACE "r < end ? operand.rows.index(r) : -1" BY "operand.rows.index(r)")
