# SPDX-License-Identifier: Apache-2.0
"""Dense language models into Mixture-of-Experts models, after DOT-MoE (arXiv 2606.01666)."""
