// SPDX-License-Identifier: Apache-2.0
#include "fomoe/kernel_path.h"

#include "harness.h"

namespace {

using fomoe::choose_path;
using fomoe::DType;
using fomoe::KernelPath;
using fomoe::ProductOperands;

const void* at(uintptr_t address) { return reinterpret_cast<const void*>(address); }

std::string obstacle(const ProductOperands& operands) {
  const char* text = fomoe::obstacle_to_tensor_cores(operands);
  return text ? text : "";
}

}  // namespace

TEST(hopper_has_kernels_of_its_own_and_every_other_card_takes_those_of_ampere) {
  const ProductOperands operands = {DType::kBFloat16, {at(16), at(4096)}, {8, 2048}};
  CHECK(choose_path(80, operands) == KernelPath::kSm80);   // A100
  CHECK(choose_path(86, operands) == KernelPath::kSm80);   // A10, RTX 30
  CHECK(choose_path(89, operands) == KernelPath::kSm80);   // L40, RTX 40
  CHECK(choose_path(90, operands) == KernelPath::kSm90);   // H100, H200
  CHECK(choose_path(100, operands) == KernelPath::kSm80);  // B200
  CHECK(choose_path(120, operands) == KernelPath::kSm80);  // RTX 50
}

TEST(tensor_cores_take_the_two_16_bit_types) {
  for (const int capability : {80, 90, 100}) {
    for (const DType dtype : {DType::kFloat64, DType::kFloat32}) {
      CHECK(choose_path(capability, {dtype, {at(16)}, {8}}) == KernelPath::kSimple);
    }
  }
  CHECK(choose_path(90, {DType::kFloat16, {at(16)}, {8}}) == KernelPath::kSm90);
  CHECK_EQUAL(obstacle({DType::kFloat32, {}, {}}), "the dtype is neither bfloat16 nor float16");
}

TEST(every_array_must_begin_at_a_multiple_of_16_bytes) {
  for (const uintptr_t address : {2, 4, 8, 15, 24}) {
    const ProductOperands operands = {DType::kBFloat16, {at(256), at(address)}, {8}};
    CHECK(choose_path(90, operands) == KernelPath::kSimple);
    CHECK_EQUAL(obstacle(operands), "an array does not begin at a multiple of 16 bytes");
  }
  CHECK_EQUAL(obstacle({DType::kBFloat16, {nullptr, at(32)}, {8}}), "");
}

TEST(every_width_must_be_a_multiple_of_8_elements) {
  for (const int64_t width : {1, 4, 12, 2047}) {
    const ProductOperands operands = {DType::kFloat16, {at(16)}, {64, width}};
    CHECK(choose_path(80, operands) == KernelPath::kSimple);
    CHECK_EQUAL(obstacle(operands), "a width is not a multiple of 8 elements");
  }
  CHECK_EQUAL(obstacle({DType::kFloat16, {at(16)}, {0, 8}}), "");  // 0: one matrix for all experts
}

TEST(decoding_is_two_rows_per_expert_at_most_or_sixteen_in_all) {
  CHECK(fomoe::is_decode(16, 4));
  CHECK(!fomoe::is_decode(17, 4));
  CHECK(fomoe::is_decode(256, 128));
  CHECK(!fomoe::is_decode(257, 128));
}

TEST(paths_have_names) {
  CHECK_EQUAL(std::string(fomoe::name_of(KernelPath::kSimple)), "simple");
  CHECK_EQUAL(std::string(fomoe::name_of(KernelPath::kSm80)), "sm80");
  CHECK_EQUAL(std::string(fomoe::name_of(KernelPath::kSm90)), "sm90");
}

TEST(a_machine_without_a_gpu_has_no_compute_capability) {
  const int capability = fomoe::cuda_compute_capability();
  CHECK(capability == 0 || capability >= 30);
}
