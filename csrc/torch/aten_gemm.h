// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fomoe/gemm.h"

namespace fomoe::binding {

/// torch's own matrix product on the CPU: aten::mm.out through the stable dispatcher.
Gemm aten_gemm();

}  // namespace fomoe::binding
