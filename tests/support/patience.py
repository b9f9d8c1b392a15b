"""How long tests wait, and how many examples they try.

A test waits for an event; the limits here only end a test that fails.

`HOBERPROXY_TEST_PATIENCE` multiplies every limit, for machines that are busier than these limits
allow for: at 1, the default, the suite passes beside eight other busy processes on two cores.
`HOBERPROXY_TEST_EXAMPLES` multiplies the examples of property tests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

SCALE: Final = float(os.environ.get("HOBERPROXY_TEST_PATIENCE", "1"))


def patient(seconds: float) -> float:
    """Return `seconds` as long as this machine needs them to be."""
    return seconds * SCALE


WAIT: Final = patient(60.0)  # seconds until an event is taken for one that never comes
TEST_LIMIT: Final = patient(300.0)  # seconds of a whole test with its fixtures
LONG_TEST_LIMIT: Final = patient(900.0)  # … of one that installs, boots or loads for minutes


def wait_until(condition: Callable[[], bool]) -> None:
    """Block until `condition` holds; fail after WAIT seconds."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


_EXAMPLES: Final = float(os.environ.get("HOBERPROXY_TEST_EXAMPLES", "1"))


def examples(usual: int) -> int:
    """Return how many examples a property test tries that tries `usual` of them in CI."""
    return max(1, round(usual * _EXAMPLES))
