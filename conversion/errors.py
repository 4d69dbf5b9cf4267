# SPDX-License-Identifier: Apache-2.0
"""The two ways in which a verb fails. Each message says what was found and what to do."""


class CMoEError(Exception):
    """The work failed; the command line exits with status 1."""

    exit_status = 1


class RequestError(CMoEError, ValueError):
    """The request was wrong and nothing was started; the command line exits with status 2."""

    exit_status = 2


def missing(what: str, extra: str) -> RequestError:
    """For a package of an extra that is not installed. There is no release on an index yet."""
    return RequestError(f"{what}: `pip install '.[{extra}]'` in a checkout of cmoe-hf.")
