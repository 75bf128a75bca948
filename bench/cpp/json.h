// SPDX-License-Identifier: Apache-2.0
// JSON objects of one line.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

namespace bench {

class Json {
 public:
  Json& add(const char* name, std::string_view value) { return raw(name, quoted(value)); }
  Json& add(const char* name, const char* value) { return add(name, std::string_view(value)); }
  Json& add(const char* name, int64_t value) { return raw(name, std::to_string(value)); }
  Json& add(const char* name, int value) { return add(name, static_cast<int64_t>(value)); }
  Json& add(const char* name, bool value) { return raw(name, value ? "true" : "false"); }
  Json& add(const char* name, double value) { return raw(name, number(value)); }
  Json& add(const char* name, const std::vector<double>& values) {
    std::string text;
    for (const double value : values) text += (text.empty() ? "" : ", ") + number(value);
    return raw(name, "[" + text + "]");
  }
  Json& add(const char* name, const Json& value) { return raw(name, value.text()); }
  Json& add_null(const char* name) { return raw(name, "null"); }
  Json& add_all(const Json& other) {
    if (!other.members_.empty()) members_ += (members_.empty() ? "" : ", ") + other.members_;
    return *this;
  }

  std::string text() const { return "{" + members_ + "}"; }

 private:
  Json& raw(const char* name, const std::string& value) {
    members_ += (members_.empty() ? "" : ", ") + quoted(name) + ": " + value;
    return *this;
  }

  static std::string number(double value) {
    if (!std::isfinite(value)) return "null";
    char text[32];
    std::snprintf(text, sizeof text, "%.6g", value);
    return text;
  }

  static std::string quoted(std::string_view value) {
    std::string text = "\"";
    for (const char c : value) {
      if (c == '"' || c == '\\') text += '\\';
      text += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
    return text + '"';
  }

  std::string members_;
};

}  // namespace bench
