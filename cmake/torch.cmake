# SPDX-License-Identifier: Apache-2.0
# Finds the torch of the active Python without importing it, and offers it as `fomoe_torch_stable`.
# -I ignores PYTHONPATH, so that pip's isolated build overlay does not hide the user's packages.
if(NOT FOMOE_TORCH_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -I -c
      "import importlib.util as u, sys; s = u.find_spec('torch'); sys.exit(1) if s is None else print(s.submodule_search_locations[0])"
    OUTPUT_VARIABLE FOMOE_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_missing)
  if(torch_missing)
    message(FATAL_ERROR "fomoe: torch was not found; install torch >= 2.11 first, then run "
                        "`pip install --no-build-isolation .` in the same environment.")
  endif()
endif()

file(STRINGS "${FOMOE_TORCH_DIR}/version.py" torch_version_line REGEX "^__version__")
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+[^']*" FOMOE_TORCH_VERSION "${torch_version_line}")
if(FOMOE_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "fomoe: torch ${FOMOE_TORCH_VERSION} was found; fomoe needs torch >= 2.11.")
endif()
message(STATUS "fomoe: torch ${FOMOE_TORCH_VERSION}")

add_library(fomoe_torch_stable INTERFACE)
target_include_directories(fomoe_torch_stable SYSTEM INTERFACE "${FOMOE_TORCH_DIR}/include")
# Only the stable ABI as of torch 2.11: the binary then loads in every later torch, CPU or CUDA.
target_compile_definitions(fomoe_torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
# Its headers put __FILE__ into error messages.
target_compile_options(fomoe_torch_stable INTERFACE
  "-ffile-prefix-map=${FOMOE_TORCH_DIR}/include/=")
# libtorch is needed for what it depends on: libtorch_cuda, if torch was built with CUDA, whose
# symbols are otherwise out of this library's sight.
set(libtorch "${FOMOE_TORCH_DIR}/lib/libtorch${CMAKE_SHARED_LIBRARY_SUFFIX}")
if(NOT APPLE)
  set(libtorch -Wl,--no-as-needed "${libtorch}" -Wl,--as-needed)
endif()
target_link_libraries(fomoe_torch_stable INTERFACE
  "${FOMOE_TORCH_DIR}/lib/libtorch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX}" ${libtorch})
