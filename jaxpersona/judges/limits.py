"""Limits of an endpoint judge: requests and tokens per minute, and a budget in calls or USD."""

from __future__ import annotations

import dataclasses
import math
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from jaxpersona.judges.endpoint import Reply

ATTEMPTS = 6  # maximum number of times that a request is sent before it counts as failed
MOST = 1_000_000  # maximum of `Batch.size`
IN_A_ROW = 20  # number of consecutive failures after which a judge stops
LONGEST_WAIT = 600.0  # maximum delay in seconds; if the endpoint requests more, the judge stops
_AROUND = 64  # assumed maximum number of chat template tokens in a prompt, for `Tariff.bound`


def _check_price(price: tuple[float, float] | None) -> None:
    """Check a pair of prices.

    Raises:
      UserError: a price is negative or not finite.
    """
    if price is not None and not all(0 <= x < math.inf for x in price):
        raise UserError(f"price is {price}; give two finite, nonnegative prices in USD per "
                        "million tokens")


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

    def excess(self, calls: int, usd: float, bound: float) -> str:
        """Return a message that says why the budget does not allow a request and how to continue.

        Args:
          calls, usd: the number of requests so far, and their total cost in USD.
          bound: the maximum cost of the next request in USD.
        """
        why = (f"the next request, which may cost up to ${bound:,.4g}, does not fit into the "
               f"budget of {self}" if self.allows(calls + 1, usd)
               else f"the budget of {self} is used up")
        return (f"{why} (calls: {calls:,}" + (f", cost: ${usd:,.4f}" if usd else "")
                + "); to continue, give a larger --budget and run the same command again")

    def __str__(self) -> str:
        parts = ([] if self.calls is None else [f"{self.calls:,} calls"]) + (
            [] if self.usd is None else [f"${self.usd:,.2f}"])
        return " and ".join(parts) or "no limit"


@dataclasses.dataclass(frozen=True)
class Tariff:
    """The prices from which the costs of requests are computed.

    Attributes:
      price: (price of prompts, price of answers) in USD per million tokens; None: unknown, and
        counted as 0.
      max_tokens: the maximum length of an answer in tokens.

    Raises:
      UserError: a price is negative or not finite.
    """

    price: tuple[float, float] | None
    max_tokens: int

    def __post_init__(self) -> None:
        _check_price(self.price)

    def bound(self, prompt: str) -> float:
        """Return the maximum cost of a request in USD.

        The prompt is assumed to have at most one token per UTF-8 byte, plus `_AROUND` tokens.
        """
        return self.usd(len(prompt.encode("utf-8", "surrogatepass")) + _AROUND, self.max_tokens)

    def usd(self, before: float, after: float) -> float:
        """Return the price in USD of `before` prompt tokens and `after` answer tokens."""
        if self.price is None:
            return 0.0
        return (before * self.price[0] + after * self.price[1]) / 1e6

    def cost(self, reply: Reply, bound: float) -> float:
        """Return the cost of an answer in USD.

        If the endpoint returned no cost, the cost is computed from the token counts and the price.
        If a token count is also missing, the cost is `bound`.
        """
        if reply.usd is not None:
            return reply.usd
        if reply.prompt_tokens is None or reply.reply_tokens is None:
            return bound
        return self.usd(reply.prompt_tokens, reply.reply_tokens)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Settings of the batch interface.

    Attributes:
      size: the maximum number of requests in one batch, from 1 to 1,000,000. A batch file is also
        limited to 100 MB.
      price: (price of prompts, price of answers) in USD per million tokens in a batch; None: the
        prices of the judge.
      poll: the longest delay between two requests for the state of a batch, in seconds; above 0, at
        most 3600. The first delay is at most 5 seconds. A delay is longer if the endpoint asks for
        a longer one.

    Raises:
      UserError: a setting is out of range.

    Examples:
      >>> from jaxpersona.judges.limits import Batch
      >>> Batch(size=1000, price=(0.2, 0.8))
      Batch(size=1000, price=(0.2, 0.8), poll=60.0)
    """

    size: int = 50_000
    price: tuple[float, float] | None = None
    poll: float = 60.0

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 1 <= self.size <= MOST:
            raise UserError(f"size is {self.size!r:.40}; give the maximum number of requests in a "
                            f"batch, an integer from 1 to {MOST}")
        _check_price(self.price)
        if not 0 < self.poll <= 3600:
            raise UserError(f"poll is {self.poll}; give a number of seconds above 0, at most 3600")


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
