"""Limits of an endpoint judge: requests and tokens per minute, and a budget in calls or USD."""

from __future__ import annotations

import dataclasses
import math
import re
import threading
import time
from collections.abc import Callable

from jaxpersona.errors import UserError


@dataclasses.dataclass(frozen=True)
class Budget:
    """The maximum number or cost of the requests in a journal.

    Attributes:
      calls: the maximum number of requests, including retries; None: no limit.
      usd: the maximum cost in USD; None: no limit.

    Examples:
      >>> from jaxpersona.judges.limits import Budget
      >>> Budget.parse("500calls")
      Budget(calls=500, usd=None)
      >>> Budget.parse("2.50usd").usd
      2.5
    """

    calls: int | None = None
    usd: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse a budget such as "500calls", "5usd" or "$5".

        Raises:
          UserError: the text does not have one of these forms.
        """
        plain = text.strip().lower().replace(",", "")
        if match := re.fullmatch(r"(\d{1,12})\s*calls?", plain):
            return cls(calls=int(match[1]))
        number = r"\d{1,9}(?:\.\d{1,9})?"
        if match := re.fullmatch(rf"\$\s*({number})|({number})\s*(?:usd|\$)", plain):
            return cls(usd=float(match[1] or match[2]))
        raise UserError(f"budget is {text!r:.40}; give calls or USD, such as 500calls or 5usd")

    def part(self, share: int) -> Budget:
        """Return the budget of one of `share` processes; the number of calls is rounded down."""
        return Budget(None if self.calls is None else self.calls // share,
                      None if self.usd is None else self.usd / share)

    def allows(self, calls: int, usd: float) -> bool:
        """Return whether a total number of calls and a total cost are within the budget."""
        return ((self.calls is None or calls <= self.calls)
                and (self.usd is None or usd <= self.usd + 1e-12))

    def __str__(self) -> str:
        return f"{self.calls:,} calls" if self.calls is not None else f"${self.usd:,.2f}"


class Pace:
    """Delays requests so that the numbers of requests and tokens per minute stay within limits.

    Args:
      requests: the maximum number of requests per minute; None: no limit.
      tokens: the maximum number of tokens per minute; None: no limit.
      clock: a function that returns the time in seconds.

    Raises:
      UserError: a rate is not positive and finite.
    """

    def __init__(self, requests: float | None = None, tokens: float | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        for name, rate in (("rpm", requests), ("tpm", tokens)):
            if rate is not None and not 0 < rate < math.inf:
                raise UserError(f"{name} is {rate}; it must be positive and finite")
        self._each = 0.0 if requests is None else 60.0 / requests
        self._token = 0.0 if tokens is None else 60.0 / tokens
        self._clock, self._lock = clock, threading.Lock()
        self._request_at = self._tokens_at = self._held = -math.inf

    def wait(self, tokens: float, stopped: threading.Event) -> bool:
        """Wait until a request of about `tokens` tokens may be sent.

        Returns:
          True if the request may be sent; False if `stopped` was set.
        """
        while not stopped.is_set():
            with self._lock:
                now = self._clock()
                at = max(self._request_at, self._tokens_at, self._held)
                if at <= now:
                    self._request_at = now + self._each
                    self._tokens_at = now + tokens * self._token
                    return True
            stopped.wait(min(at - now, 1.0))  # at most 1 s, as `settle` and `hold` may change `at`
        return False

    def settle(self, estimated: float, actual: float) -> None:
        """Correct the number of tokens of a sent request from the estimate to the actual number."""
        with self._lock:
            self._tokens_at += (actual - estimated) * self._token

    def hold(self, seconds: float) -> None:
        """Delay all requests by at least `seconds`, as a Retry-After header requires."""
        with self._lock:
            self._held = max(self._held, self._clock() + seconds)
