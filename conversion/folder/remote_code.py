# SPDX-License-Identifier: Apache-2.0
"""The Python files that travel with a carved repository, and those of earlier releases."""

import hashlib
import json
import sys
from pathlib import Path

from cmoe_hf.families import CODE, carved_classes, repository_code

from ..source.architectures import TESTED

REMOTE_CODE = tuple(CODE)
RELEASED = Path(__file__).parent.parent / "assets" / "released.json"
"""Names of files by the SHA-256 that releases of this project gave them."""


def code_of_type(model_type: str | None) -> dict[str, str]:
    """Return the files of today by the `model_type` of a model; none if it is not carved."""
    if not str(model_type).startswith("cmoe_"):
        return {}
    try:
        return repository_code(carved_classes(str(model_type))[0])
    except KeyError:  # this transformers does not know the family
        return {}


if __name__ == "__main__":  # a release adds what it puts into repositories
    hashes = json.loads(RELEASED.read_text(encoding="utf-8"))
    for model_type in TESTED:
        for name, text in repository_code(carved_classes(model_type)[0]).items():
            hashes[hashlib.sha256(text.encode()).hexdigest()] = name
    RELEASED.write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    print(f"{len(hashes)} hashes in {RELEASED}", file=sys.stderr)
