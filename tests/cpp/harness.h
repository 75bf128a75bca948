// SPDX-License-Identifier: Apache-2.0
// A small test harness: TEST(name) { CHECK(...); }. A failed check ends its test, not the program.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace harness {

struct Test {
  std::string name;
  std::function<void()> body;
};

inline std::vector<Test>& registry() {
  static std::vector<Test> tests;
  return tests;
}

struct Registration {
  Registration(const char* name, std::function<void()> body) {
    registry().push_back({name, std::move(body)});
  }
};

template <typename T>
std::string show(const T& value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

template <typename T>
std::string show(const std::vector<T>& values) {
  std::ostringstream text;
  for (const T& value : values) text << value << " ";
  return text.str();
}

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

/// Uniform values in [-1, 1), the same on every machine.
inline std::vector<double> random_values(int64_t count, uint32_t seed) {
  std::mt19937 engine(seed);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) value = static_cast<double>(engine()) / 2147483648.0 - 1.0;
  return values;
}

}  // namespace harness

#define TEST(name)                                                     \
  static void name();                                                  \
  static const harness::Registration registration_##name(#name, name); \
  static void name()

#define CHECK(condition) \
  if (!(condition)) harness::fail(__FILE__, __LINE__, "CHECK(" #condition ") is false")

#define CHECK_EQUAL(actual, expected) \
  if (!((actual) == (expected)))      \
  harness::fail(__FILE__, __LINE__,   \
                #actual " is " + harness::show(actual) + ", expected " + harness::show(expected))

#define CHECK_CLOSE(actual, expected, tolerance)         \
  if (!(std::abs((actual) - (expected)) <= (tolerance))) \
  harness::fail(__FILE__, __LINE__,                      \
                #actual " is " + harness::show(actual) + ", expected " + harness::show(expected))
