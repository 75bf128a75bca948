// SPDX-License-Identifier: Apache-2.0
#include "fomoe/device.h"

#include "fomoe/vectorize.h"
#include "harness.h"

TEST(the_capability_is_one_that_the_kernels_were_compiled_for) {
  const std::string capability = fomoe::cpu_capability();
#ifdef FOMOE_HAS_CLONES
  CHECK(capability == "x86-64-v4" || capability == "x86-64-v3" || capability == "baseline");
#else
  CHECK_EQUAL(capability, "baseline");
#endif
}
