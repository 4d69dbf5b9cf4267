# SPDX-License-Identifier: Apache-2.0
"""`python -m cmoe_hf.conversion.cli` is the same as `cmoe`."""

from . import main

main()
