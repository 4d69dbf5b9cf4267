# SPDX-License-Identifier: Apache-2.0
"""The two ways in which a verb fails. Each message says what was found and what to do."""

from collections.abc import Collection, Sequence


class CMoEError(Exception):
    """The work failed; the command line exits with status 1."""

    exit_status = 1


class RequestError(CMoEError, ValueError):
    """The request was wrong and nothing was started; the command line exits with status 2."""

    exit_status = 2


def missing(what: str, extra: str) -> RequestError:
    """For a package of an extra that is not installed. There is no release on an index yet."""
    return RequestError(f"{what}: `pip install '.[{extra}]'` in a checkout of cmoe-hf.")


def check_known(what: str, given: str | None, known: Collection[str]) -> None:
    """Raise `RequestError` for a name that is not one of these; None leaves the choice open."""
    if given is not None and given not in known:
        raise RequestError(f"there is no {what} {given!r}; choose one of {', '.join(known)}.")


def check_at_least(least: int, **options: int | Sequence[int] | None) -> None:
    """Raise `RequestError` for the first option with a value below `least`; None is no value."""
    for name, given in options.items():
        for value in [given] if isinstance(given, int) else given or ():
            if value < least:
                option = f"--{name.replace('_', '-')}"
                raise RequestError(f"{option} is {value}; it must be at least {least}.")
