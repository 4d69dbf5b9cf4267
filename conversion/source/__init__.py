# SPDX-License-Identifier: Apache-2.0
"""What comes in: checkpoints, what the library makes of their configuration, and texts.

Hands out `open_source` and its `Source`, an entry of `ARCHITECTURES` for each family, and tokens.
"""
