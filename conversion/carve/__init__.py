# SPDX-License-Identifier: Apache-2.0
"""The algorithm: profile, partition, route and refit, one layer at a time.

`pipeline` is the paper's section 4 on one screen, `hierarchy` its form for a MoE. What is asked
for is in `settings`, which choices a recipe makes in `recipe`; the steps are pure functions of
tensors.
"""
