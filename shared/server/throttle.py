"""Guessing made slow: who fails has to wait, longer each time; many failures slow everybody a little.

Nobody is locked out by somebody else: a wait holds for one address, and the common pause is a short one.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict, deque
from collections.abc import Callable

FREE_TRIES = 4
LONGEST_WAIT = 60.0  # seconds
FORGOTTEN_AFTER = 900.0
REMEMBERED = 10_000  # addresses
BUSY_FAILURES = 20  # in the last minute, from anywhere: from then on every try takes a moment
LONGEST_PAUSE = 3.0


class LoginThrottle:
    """Counts failures. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()  # address -> (how many, last)
        self._recent: deque[float] = deque(maxlen=1000)

    def retry_after(self, address: str) -> float:
        """Seconds that this address has to wait before its next try is looked at."""
        count, last = self._failures.get(_network(address), (0, 0.0))
        passed = self._clock() - last
        if count < FREE_TRIES or passed > FORGOTTEN_AFTER:
            return 0.0
        return max(0.0, min(LONGEST_WAIT, 2.0 ** (count - FREE_TRIES)) - passed)

    def delay(self) -> float:
        """Seconds that every try takes now."""
        while self._recent and self._clock() - self._recent[0] > 60:
            self._recent.popleft()
        return min(LONGEST_PAUSE, max(0, len(self._recent) - BUSY_FAILURES) / 10)

    def record_failure(self, address: str) -> None:
        now, network = self._clock(), _network(address)
        count, last = self._failures.pop(network, (0, now))
        self._failures[network] = (1 if now - last > FORGOTTEN_AFTER else count + 1, now)
        self._recent.append(now)
        if len(self._failures) > REMEMBERED:
            self._failures.popitem(last=False)

    def reset(self, address: str) -> None:
        self._failures.pop(_network(address), None)


def _network(address: str) -> str:
    """One subscriber has a whole /64 of IPv6 addresses."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return str(found)
    return str(ipaddress.ip_network((found.packed[:8] + bytes(8), 64)))
