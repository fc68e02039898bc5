"""A client that sends requests to an OpenAI-compatible endpoint and classifies errors.

The client reads the API key from an environment variable and removes the key from every text that
the endpoint returns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import itertools
import json
import math
import os
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from jaxpersona.brief import line, quoted
from jaxpersona.errors import UserError
from jaxpersona.extras import require
from jaxpersona.inputs import printable

OPENAI = "https://api.openai.com/v1"
_AGAIN = frozenset((408, 409, 429))  # HTTP status codes that allow a retry, besides 5xx
_NEVER = {401: "the endpoint rejects the API key", 402: "the endpoint requires payment",
          404: "the endpoint has no such model or URL"}
_TOKENS = 10**9  # token counts above this limit are ignored
_USD = 1e6  # a cost above this limit, in USD per answer, is ignored
_SHOWN = 160  # maximum number of characters that are kept of each text from the endpoint
_CHAT = "/v1/chat/completions"  # the URL in a batch file, which does not depend on the base URL
_FILE_SECONDS = 600.0  # timeout in seconds for the upload or download of a file
RESULT_BYTES = 1 << 30  # maximum size of a results file in bytes
_LISTED = 1000  # number of recent batches among which `Endpoint.find_batch` searches
_NAME = "jaxpersona"  # the field of a batch's metadata that contains its name


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
      status: the HTTP status code of the endpoint's error, or None.
    """

    def __init__(self, message: str, *, again: bool = False, fatal: bool = False,
                 after: float | None = None, maybe_paid: bool = False,
                 status: int | None = None) -> None:
        super().__init__(message)
        self.again, self.fatal, self.after, self.maybe_paid = again, fatal, after, maybe_paid
        self.status = status


class OtherLength(Failure):
    """Raised if the model requires the field `max_completion_tokens` instead of `max_tokens`."""


@dataclasses.dataclass(frozen=True)
class BatchState:
    """The state of a batch at the endpoint.

    Attributes:
      id: the endpoint's identifier of the batch.
      status: the status, such as "in_progress"; `ended` is true if it is final.
      done, total: the numbers of processed requests and of all requests; 0 if unknown.
      files: the identifiers of the results files: answers, then errors.
      problems: the endpoint's reasons why the batch failed, or "".
    """

    id: str
    status: str
    done: int = 0
    total: int = 0
    files: tuple[str, ...] = ()
    problems: str = ""

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.status in ("completed", "failed", "expired", "cancelled", "canceled")


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

    Attributes:
      length: the name of the request field that contains `max_tokens`: "max_tokens" or, after an
        `OtherLength` error, "max_completion_tokens".

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
        self.length = "max_tokens"  # newer OpenAI models require max_completion_tokens
        self.max_tokens, self.temperature = max_tokens, temperature
        self._client = self._api.OpenAI(
            api_key=key or "none", base_url=url, timeout=timeout, max_retries=0)

    def __repr__(self) -> str:
        return line("Endpoint", quoted(self.model), quoted(self.url, 60))

    def ask(self, prompt: str) -> Reply:
        """Send one request and return the answer.

        Raises:
          Failure: the request got no usable answer.
        """
        length = self.length
        with self._translated("a chat completion", length):
            return self._reply(self._client.chat.completions.create(
                **self._fields(prompt, length)))

    def request(self, key: str, prompt: str) -> bytes:
        """Return the line for a prompt in a batch file, with `key` as its custom_id."""
        value = {"custom_id": key, "method": "POST", "url": _CHAT,
                 "body": self._fields(prompt, self.length)}
        return json.dumps(value).encode() + b"\n"

    def upload(self, name: str, lines: bytes) -> str:
        """Upload a batch file; return its identifier at the endpoint.

        Raises:
          Failure: the endpoint did not accept the file.
        """
        with self._translated("a file"):
            found = self._client.with_options(timeout=_FILE_SECONDS).files.create(
                file=(f"{_NAME}-{name}.jsonl", lines, "application/jsonl"), purpose="batch")
            return self._identifier(found.id)

    def submit(self, name: str, file: str) -> BatchState:
        """Submit an uploaded batch file as a named batch, to be processed within 24 hours.

        Raises:
          Failure: the endpoint did not accept the batch or, if `maybe_paid` is true, may have
            accepted it.
        """
        with self._translated("a batch"):
            return self._state(self._client.batches.create(
                input_file_id=file, endpoint=_CHAT, completion_window="24h",
                metadata={_NAME: name}))

    def batch(self, identifier: str) -> BatchState:
        """Return the state of a batch.

        Raises:
          Failure: the endpoint did not return the state.
        """
        with self._translated("a batch"):
            return self._state(self._client.batches.retrieve(identifier))

    def find_batch(self, name: str) -> BatchState | None:
        """Return the state of the named batch; None if not among the last `_LISTED` batches.

        Raises:
          Failure: the endpoint did not list its batches.
        """
        with self._translated("a list of batches"):
            for found in itertools.islice(self._client.batches.list(limit=100), _LISTED):
                if (getattr(found, "metadata", None) or {}).get(_NAME) == name:
                    return self._state(found)
        return None

    def download(self, file: str) -> bytes:
        """Return the content of a results file.

        Raises:
          Failure: the endpoint did not return the file, or it has more than `RESULT_BYTES` bytes.
        """
        with self._translated("a file"):
            client = self._client.with_options(timeout=_FILE_SECONDS)
            with client.files.with_streaming_response.content(file) as found:
                data = bytearray()
                for part in found.iter_bytes():
                    data += part
                    if len(data) > RESULT_BYTES:
                        raise Failure(f"a file with results has more than {RESULT_BYTES:,} bytes; "
                                      "give a smaller --judge-batch-size", maybe_paid=True)
                return bytes(data)

    def outcome(self, line: bytes) -> tuple[str, Reply | Failure] | None:
        """Return the custom_id and the outcome in one line of a results file.

        The result is None if the line is not a JSON object or has no custom_id.
        """
        try:
            value = json.loads(line)
            key, response, error = value["custom_id"], value.get("response"), value.get("error")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        if not isinstance(key, str):
            return None
        try:
            with self._translated("a chat completion"):
                if not error and response["status_code"] == 200:
                    return key, self._reply(
                        self._api.types.chat.ChatCompletion.construct(**response["body"]))
                if not error and type(response["status_code"]) is int:
                    problem = response["body"]["error"]
                    raise self._refused(response["status_code"], str(problem.get("message")),
                                        problem.get("code"), "max_tokens")
                raise Failure(self._clean(f"{error['code']}: {error['message']}"))
        except Failure as failure:
            return key, failure

    def close(self) -> None:
        """Close the connections to the endpoint."""
        self._client.close()

    @contextlib.contextmanager
    def _translated(self, wanted: str, length: str = "") -> Iterator[None]:
        """Convert errors of the client, and errors due to a malformed response, to a `Failure`.

        Args:
          wanted: a description of the expected response, for the message.
          length: the value of `self.length` in the request; "" if the request has no such field.
        """
        api = self._api
        try:
            yield
        except api.APITimeoutError:
            raise Failure("no answer before the timeout", again=True, maybe_paid=True) from None
        except api.APIStatusError as error:
            raise self._refused(error.status_code, str(error.message), error.code, length,
                                retry_after(error.response.headers)) from None
        except api.APIConnectionError as error:
            cause = error.__cause__
            raise Failure(self._clean(f"the connection failed ({cause or error})"), again=True,
                          maybe_paid=not _unconnected(cause)) from None
        except (api.OpenAIError, ValueError, TypeError, KeyError, AttributeError,
                IndexError) as error:
            raise Failure(self._clean(f"the answer is not {wanted} ({error})"), again=True,
                          maybe_paid=True) from None

    def _fields(self, prompt: str, length: str) -> dict[str, Any]:
        """Return the fields of a chat request; `length` is the name of its length field."""
        return {"model": self.model, "messages": [{"role": "user", "content": prompt}],
                "temperature": self.temperature, length: self.max_tokens}

    def _identifier(self, value: Any) -> str:
        """Validate an identifier from the endpoint, and return it.

        Raises:
          TypeError: the value is not a line of 1 to `_SHOWN` characters, or contains the API key.
        """
        if not isinstance(value, str) or not value or self._clean(value) != value:
            raise TypeError("the endpoint returned no valid id")
        return value

    def _state(self, found: Any) -> BatchState:
        """Convert a batch of the client to a `BatchState`.

        Raises:
          TypeError, AttributeError: a field is missing or has the wrong type.
        """
        counts = [getattr(getattr(found, "request_counts", None), name, None)
                  for name in ("completed", "failed", "total")]
        done, failed, total = (n if isinstance(n, int) and 0 <= n <= _TOKENS else 0 for n in counts)
        files = (getattr(found, name, None) for name in ("output_file_id", "error_file_id"))
        faults = list(getattr(getattr(found, "errors", None), "data", None) or [])[:3]
        return BatchState(
            self._identifier(found.id), self._clean(found.status.lower()), done + failed, total,
            tuple(self._identifier(file) for file in files if file),
            self._clean("; ".join(f"{getattr(fault, 'code', '')}: {getattr(fault, 'message', '')}"
                                  for fault in faults)))

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

    def _refused(self, status: int, message: str, code: Any, length: str,
                 after: float | None = None) -> Failure:
        """Return the `Failure` for an HTTP error.

        If the error shows that the model requires the field `max_completion_tokens`, later requests
        use this field instead of `max_tokens`.

        Args:
          status: the HTTP status code.
          message, code: the message and the code of the endpoint's error.
          length: the value of `self.length` in the request; "max_tokens" if unknown, "" if unused.
          after: the delay in seconds that the endpoint requests, or None.
        """
        message = self._clean(message)
        if status == 400 and length == "max_tokens" and "max_completion_tokens" in message:
            self.length = "max_completion_tokens"
            return OtherLength("the model requires max_completion_tokens", again=True, after=0.0)
        what = f"HTTP {status}: {message}"
        if status in _NEVER or code == "insufficient_quota":
            return Failure(f"{_NEVER.get(status, 'the quota is used up')} ({what})", fatal=True,
                           status=status)
        return Failure(what, again=status in _AGAIN or status >= 500, after=after, status=status)

    def _clean(self, text: str) -> str:
        """Return a text from the endpoint as one line of limited length, without the API key."""
        if self._key:
            text = text.replace(self._key, "[key]")
        return " ".join(printable(text).split())[:_SHOWN]


def retry_after(headers: Any, now: float | None = None) -> float | None:
    """Return the delay in seconds from the header Retry-After-Ms or else Retry-After.

    If both headers are missing or invalid, return None. `now` is a Unix time in seconds, by default
    the current time.
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
        raise UserError("--judge-url is not an HTTP URL; give one such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError("--judge-url contains a user, a password, a query or a fragment; give the "
                        "URL without them, and the key in an environment variable")
