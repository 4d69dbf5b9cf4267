# SPDX-License-Identifier: Apache-2.0
"""What goes out, safely: a folder that is absent, visibly unfinished, or complete.

Hands out `PartialFolder` and `WorkFolder`, what goes with a model unchanged, its card, and the
fingerprint of what it computes.
"""
