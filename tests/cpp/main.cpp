// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <exception>

#include "harness.h"

int main() {
  int failures = 0;
  for (const harness::Test& test : harness::registry()) {
    try {
      test.body();
      std::printf("ok    %s\n", test.name.c_str());
    } catch (const std::exception& error) {
      ++failures;
      std::printf("FAIL  %s: %s\n", test.name.c_str(), error.what());
    }
    std::fflush(stdout);  // a test that hangs or crashes comes after the last that is named
  }
  if (harness::registry().empty()) std::printf("FAIL  no tests were registered\n");
  return failures == 0 && !harness::registry().empty() ? 0 : 1;
}
