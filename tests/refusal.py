# SPDX-License-Identifier: Apache-2.0
"""What every refused command looks like."""


def refused(result, status, *phrases):
    """One line on standard error with every phrase; nothing on standard output."""
    assert result.exit_code == status, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for phrase in phrases:
        assert phrase in result.stderr, result.stderr
