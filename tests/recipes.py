# SPDX-License-Identifier: Apache-2.0
"""The first edition of `refined`: for tests of what has nothing to do with how good a recipe is."""

from cmoe_hf.conversion import Recipe

FIRST_CHANGES = {
    "router_epochs": 0,
    "reassignments": 0,
    "held_out_ridge": False,
    "token_weights": "equal",
}
FIRST_EDITION = Recipe.of("refined", **FIRST_CHANGES)
