// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

/// Adds fomoe._C.all_to_all_plan.
void define_all_to_all_plan(pybind11::module_& m);
