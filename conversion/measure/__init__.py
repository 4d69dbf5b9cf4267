# SPDX-License-Identifier: Apache-2.0
"""How good and how fast: perplexity, tasks, routers beside an oracle, times beside the roofline."""
