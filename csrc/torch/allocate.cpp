// SPDX-License-Identifier: Apache-2.0
#include <cstdint>

#include "tensor_args.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fomoe::binding {
namespace {

/// Asks for huge pages where the system leaves them to the program; elsewhere, or if the system
/// refuses, nothing changes but speed.
void advise_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

}  // namespace

Tensor empty_result(const Tensor& like, std::initializer_list<int64_t> sizes,
                    std::optional<ScalarType> dtype) {
  constexpr int64_t kLarge = int64_t{4} << 20;  // two huge pages
  Tensor result = torch::stable::new_empty(like, sizes, dtype);
  const int64_t bytes = result.numel() * static_cast<int64_t>(result.element_size());
  if (bytes >= kLarge && result.is_cpu()) advise_huge_pages(result.mutable_data_ptr(), bytes);
  return result;
}

}  // namespace fomoe::binding
