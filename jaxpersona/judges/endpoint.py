"""A client that sends single requests to an OpenAI-compatible endpoint and classifies errors.

The client reads the API key from an environment variable and removes the key from every text that
the endpoint returns.
"""

from __future__ import annotations

import dataclasses
import email.utils
import math
import os
import time
import urllib.parse
from typing import Any

from jaxpersona.errors import UserError
from jaxpersona.extras import require
from jaxpersona.inputs import printable

OPENAI = "https://api.openai.com/v1"
_AGAIN = frozenset((408, 409, 429))  # HTTP status codes that allow a retry, besides 5xx
_NEVER = {401: "the endpoint rejects the API key", 402: "the endpoint requires payment",
          404: "the endpoint has no such model or URL"}
_TOKENS = 10**9  # larger numbers of tokens from the endpoint are ignored
_USD = 1e6  # a larger cost of one answer is ignored
_SHOWN = 160  # maximum number of characters that are kept of each text from the endpoint


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer from the endpoint; token counts and the cost in USD are None if not returned."""

    text: str
    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    usd: float | None = None


class Failure(Exception):
    """Raised if a request gets no usable answer.

    Attributes:
      again: whether the same request may succeed later.
      fatal: whether all other requests will fail too, for example because the API key is wrong.
      after: the time in seconds to wait before the next request, or None.
      maybe_paid: whether the endpoint may charge for the request.
    """

    def __init__(self, message: str, *, again: bool = False, fatal: bool = False,
                 after: float | None = None, maybe_paid: bool = False) -> None:
        super().__init__(message)
        self.again, self.fatal, self.after, self.maybe_paid = again, fatal, after, maybe_paid


class Endpoint:
    """A client of an OpenAI-compatible endpoint.

    Args:
      model: the model's name at the endpoint.
      url: the base URL, such as "http://localhost:8000/v1". Default: the environment variable
        OPENAI_BASE_URL or, if it is not set, the URL of OpenAI.
      key_env: the name of the environment variable that contains the API key. The key is required
        for OpenAI's endpoint and optional for others.
      timeout: the time in seconds after which a request without an answer fails.
      max_tokens: the maximum length of an answer in tokens.
      temperature: the sampling temperature.

    Raises:
      UserError: the URL is invalid or contains a user, a password, a query or a fragment; the key
        is missing; or the package `openai` is not installed.
    """

    def __init__(self, model: str, *, url: str | None = None, key_env: str = "OPENAI_API_KEY",
                 timeout: float = 60.0, max_tokens: int = 10, temperature: float = 0.0) -> None:
        url = url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        _check_url(url)
        key = os.environ.get(key_env, "")
        if not key and urllib.parse.urlsplit(url).hostname == "api.openai.com":
            raise UserError(f"the environment variable {key_env} is not set; set it to the API "
                            "key, or give the URL of another endpoint (--judge-url)")
        self._api: Any = require("openai", "a judge at an endpoint needs openai")
        self._key, self.model, self.url = key, model, url
        self._length = "max_tokens"  # newer OpenAI models require max_completion_tokens
        self.max_tokens, self.temperature = max_tokens, temperature
        self._client = self._api.OpenAI(
            api_key=key or "none", base_url=url, timeout=timeout, max_retries=0)

    def __repr__(self) -> str:
        return f"Endpoint({self.model!r}, {self.url!r})"

    def ask(self, prompt: str) -> Reply:
        """Send one request and return the answer.

        Raises:
          Failure: the request got no usable answer.
        """
        api, length = self._api, self._length
        try:
            return self._reply(self._client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": prompt}],
                temperature=self.temperature, **{length: self.max_tokens}))
        except api.APITimeoutError:
            raise Failure("no answer before the timeout", again=True, maybe_paid=True) from None
        except api.APIStatusError as error:
            raise self._refused(error, length) from None
        except api.APIConnectionError as error:
            cause = error.__cause__
            raise Failure(self._clean(f"the connection failed ({cause or error})"), again=True,
                          maybe_paid=not _unconnected(cause)) from None
        except (api.OpenAIError, ValueError, TypeError, KeyError, AttributeError,
                IndexError) as error:
            raise Failure(self._clean(f"the answer is not a chat completion ({error})"), again=True,
                          maybe_paid=True) from None

    def close(self) -> None:
        """Close the connections to the endpoint."""
        self._client.close()

    def _reply(self, found: Any) -> Reply:
        """Convert a response of the client to a `Reply`.

        Raises:
          Failure: the text is empty because the answer reached the maximum length.
          TypeError, AttributeError, IndexError: a field is missing or has the wrong type.
        """
        choice = found.choices[0]
        text = choice.message.content
        if text is None:
            text = getattr(choice.message, "refusal", None) or ""
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        if not text.strip() and choice.finish_reason == "length":
            raise Failure(f"the answer has {self.max_tokens} tokens but no text, possibly because "
                          "the model reasons first; increase --judge-max-tokens", maybe_paid=True)
        usage = found.usage
        counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        before, after = (n if isinstance(n, int) and 0 <= n <= _TOKENS else None for n in counts)
        usd = getattr(usage, "cost", None)
        if isinstance(usd, bool) or not isinstance(usd, (int, float)) or not 0 <= usd <= _USD:
            usd = None
        return Reply(self._clean(text), before, after, usd)

    def _refused(self, error: Any, length: str) -> Failure:
        """Return the `Failure` for an HTTP error.

        If the error shows that the model requires the field `max_completion_tokens`, later requests
        use this field instead of `max_tokens`.

        Args:
          error: the exception that the client raised.
          length: the name of the request's field for the maximum length of the answer.
        """
        status, message = error.status_code, self._clean(str(error.message))
        if status == 400 and length == "max_tokens" and "max_completion_tokens" in message:
            self._length = "max_completion_tokens"
            return Failure("the model requires max_completion_tokens", again=True, after=0.0)
        what = f"HTTP {status}: {message}"
        if status in _NEVER or error.code == "insufficient_quota":
            return Failure(f"{_NEVER.get(status, 'the quota is used up')} ({what})", fatal=True)
        return Failure(what, again=status in _AGAIN or status >= 500,
                       after=retry_after(error.response.headers))

    def _clean(self, text: str) -> str:
        """Return a text from the endpoint as one line of limited length, without the API key."""
        if self._key:
            text = text.replace(self._key, "[key]")
        return " ".join(printable(text).split())[:_SHOWN]


def retry_after(headers: Any, now: float | None = None) -> float | None:
    """Return the delay in seconds from the header Retry-After-Ms or else Retry-After.

    If both headers are missing or invalid, return None.
    """
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            try:
                date = email.utils.parsedate_to_datetime(value)
                seconds = date.timestamp() - (time.time() if now is None else now)
            except (TypeError, ValueError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None


def _unconnected(cause: BaseException | None) -> bool:
    """Return whether a connection error with this cause occurred before the request was sent."""
    return type(cause).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout")


def _check_url(url: str) -> None:
    """Check the URL of an endpoint.

    Raises:
      UserError: the URL is not an HTTP URL, or contains a user, a password, a query or a fragment.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid port or host
        fine, parts = False, None
    if not fine or parts is None:
        raise UserError("judge-url is not an HTTP URL; give one such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError("judge-url contains a user, a password, a query or a fragment; give the "
                        "URL without them, and the key in an environment variable")
