# SPDX-License-Identifier: Apache-2.0
"""Where a model goes: other architectures, the Hub, servers; and whether it still holds there."""
