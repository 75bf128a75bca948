# SPDX-License-Identifier: Apache-2.0
"""fomoe inside other libraries, each in a package of that library's name."""
