# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: what carving has lost is trained back."""
