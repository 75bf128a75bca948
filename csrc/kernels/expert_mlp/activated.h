// SPDX-License-Identifier: Apache-2.0
// The activations of the experts, for the CPU and the CUDA kernels.
#pragma once

#include <type_traits>

#include "fomoe/expert_mlp.h"
#include "fomoe/exponential.h"
#include "fomoe/host_device.h"

namespace fomoe {

/// One activation: its value at (gate, up), and its derivatives by both.
template <typename Real>
struct Activated {
  Real value;
  Real d_gate;
  Real d_up;
};

template <Activation activation, typename Real>
FOMOE_HOST_DEVICE FOMOE_INLINE Activated<Real> activated(Real gate, Real up) {
  if constexpr (activation == Activation::kSwigluClamped) {
    // NaN passes the comparisons; a clamped input has no gradient.
    constexpr Real limit = kClampedLimit, slope = kClampedSlope;
    const Real g = gate > limit ? limit : gate;
    const Real u = up > limit ? limit : up < -limit ? -limit : up;
    const Real sigmoid = logistic(slope * g), act = g * sigmoid;
    const Real d_act = sigmoid + slope * act * (Real(1) - sigmoid);
    return {act * (u + Real(1)), gate > limit ? Real(0) : d_act * (u + Real(1)),
            up > limit || up < -limit ? Real(0) : act};
  } else {
    const Real sigmoid = logistic(gate), silu = gate * sigmoid;
    const Real d_silu = sigmoid + silu * (Real(1) - sigmoid);
    if constexpr (activation == Activation::kSilu) return {silu, d_silu, Real(0)};
    return {silu * up, d_silu * up, silu};
  }
}

/// Calls function(std::integral_constant<Activation, activation>{}).
template <typename Function>
inline void dispatch(Activation activation, Function&& function) {
  switch (activation) {
    case Activation::kSwiglu:
      return function(std::integral_constant<Activation, Activation::kSwiglu>{});
    case Activation::kSilu:
      return function(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kSwigluClamped:
      return function(std::integral_constant<Activation, Activation::kSwigluClamped>{});
  }
}

}  // namespace fomoe
