// SPDX-License-Identifier: Apache-2.0
// cp.async: the data arrive at the last moment that the instructions allow, and until then the
// target holds NaN.
#pragma once

namespace fomoe::emulation {

void cp_async(void* shared, const void* global, int valid_bytes, const void* site);
void cp_async_commit();
void cp_async_wait(int groups_in_flight);

}  // namespace fomoe::emulation
