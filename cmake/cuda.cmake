# SPDX-License-Identifier: Apache-2.0
# CUDA is compiled whenever nvcc exists; it never needs a GPU, a driver or a CUDA build of torch.
set(FOMOE_HAVE_CUDA OFF)
if(NOT FOMOE_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES OFF)  # every file names its own -gencode flags
    enable_language(CUDA)
    find_package(CUDAToolkit QUIET)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0 OR NOT CUDAToolkit_FOUND)
      set(reason "nvcc ${CMAKE_CUDA_COMPILER_VERSION} at ${CMAKE_CUDA_COMPILER}: fomoe needs "
                 "CUDA 12.0 or newer, with the toolkit's headers and libraries")
      if(FOMOE_CUDA STREQUAL "ON")
        message(FATAL_ERROR "fomoe: FOMOE_CUDA=ON, but ${reason}.")
      endif()
      message(STATUS "fomoe: ${reason}; building for the CPU only")
    else()
      set(CMAKE_CUDA_STANDARD 20)
      set(CMAKE_CUDA_STANDARD_REQUIRED ON)
      set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
      set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
      set(FOMOE_HAVE_CUDA ON)
    endif()
  elseif(FOMOE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "fomoe: FOMOE_CUDA=ON, but no CUDA compiler (nvcc) was found. "
                        "Put nvcc on PATH, or set FOMOE_CUDA=OFF for a CPU-only build.")
  endif()
endif()
message(STATUS "fomoe: CUDA kernels ${FOMOE_HAVE_CUDA} (FOMOE_CUDA=${FOMOE_CUDA})")

# sm_80 code and PTX for every card from Ampere on, and code for Hopper.
set(FOMOE_CUDA_PORTABLE_FLAGS
  "-gencode=arch=compute_80,code=[compute_80,sm_80]" "-gencode=arch=compute_90a,code=sm_90a")
set(FOMOE_CUDA_SM80_FLAGS "-gencode=arch=compute_80,code=[compute_80,sm_80]")
set(FOMOE_CUDA_SM90_FLAGS "-gencode=arch=compute_90a,code=sm_90a")
