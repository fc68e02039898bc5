"""Wait between requests about a batch, and repeat failed requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from jaxpersona.judges.endpoint import Failure
from jaxpersona.judges.limits import ATTEMPTS, LONGEST_WAIT

ABSENT = (404, 405, 501)  # HTTP status codes of an endpoint without the batch interface
GRACE = 10.0  # maximum time in seconds to wait for requests in progress when a judge is closed
_LONGEST_BACKOFF = 30.0  # maximum delay in seconds between two repetitions of a request
_Got = TypeVar("_Got")


class Ended(Exception):
    """Raised to stop sending requests, because the judge was closed or cannot continue."""


class Waiting:
    """Waits between requests, and calls a function at least once per second during each wait.

    Attributes:
      tick: the function, which has no arguments.
    """

    def __init__(self, backoff: float, tick: Callable[[], None] = lambda: None,
                 stopped: threading.Event | None = None) -> None:
        """Create the object.

        Args:
          backoff: the delay in seconds before the first repetition of a failed request.
          tick: the function to call while waiting.
          stopped: an event that ends every wait with `Ended`; default: an event that is never set.
        """
        self.tick, self._backoff = tick, backoff
        self._stopped = stopped or threading.Event()

    def wait(self, seconds: float) -> None:
        """Wait for a number of seconds.

        Raises:
          Ended: `stopped` was set.
        """
        end = time.monotonic() + seconds
        while True:
            self.tick()
            left = end - time.monotonic()
            if self._stopped.wait(min(max(left, 0.0), 1.0)):
                raise Ended
            if left <= 1.0:
                return

    def tried(self, ask: Callable[[], _Got]) -> _Got:
        """Return the result of `ask`, which is called up to `ATTEMPTS` times until it succeeds.

        Raises:
          Failure: the last call failed, a failure is permanent, or the endpoint requests a delay
            above `LONGEST_WAIT`.
          Ended: `stopped` was set.
        """
        attempt = 0
        while True:
            try:
                return ask()
            except Failure as failure:
                attempt, after = attempt + 1, failure.after or 0.0
                if (not failure.again or attempt == ATTEMPTS or after > LONGEST_WAIT
                        or failure.status in ABSENT):
                    raise
            self.wait(max(pause(self._backoff, attempt), after))


def pause(backoff: float, attempt: int) -> float:
    """Return the delay in seconds before a repetition.

    The delay doubles with each repetition, up to `_LONGEST_BACKOFF`.

    Args:
      backoff: the delay in seconds before the first repetition.
      attempt: the number of the repetition, from 1.
    """
    return min(backoff * 2 ** (attempt - 1), _LONGEST_BACKOFF)


def join(threads: Sequence[threading.Thread]) -> None:
    """Wait for threads to end, for at most `GRACE` seconds in total."""
    end = time.monotonic() + GRACE
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
