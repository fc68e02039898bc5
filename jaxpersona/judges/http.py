"""A judge that uses an OpenAI-compatible endpoint, with rate limits and a budget.

Each request is written to a journal (`journal.Journal`) before it is sent, and each answer before
it is used. A killed process therefore loses at most the answers to requests in progress.
"""

from __future__ import annotations

import math
import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jaxpersona.errors import UserError
from jaxpersona.judges.endpoint import Endpoint, Failure, Reply
from jaxpersona.judges.journal import Journal, key_of
from jaxpersona.judges.limits import Budget, Pace
from jaxpersona.judges.protocol import Item, JudgeStopped, Verdict
from jaxpersona.judges.rubric import ROLES, Rubric

ATTEMPTS = 6  # maximum number of requests per prompt in one call of `score`
IN_A_ROW = 20  # number of consecutive failed prompts after which the judge stops
LONGEST_WAIT = 600.0  # seconds; if the endpoint requests a longer delay, the judge stops
_BACKOFF = 0.5  # seconds before the first retry; doubled each time, up to _LONGEST_BACKOFF
_LONGEST_BACKOFF = 30.0
_GRACE = 10.0  # seconds to wait for answers to requests in progress when the judge stops
_AROUND = 64  # assumed number of chat template tokens, for the upper bound of a request's cost


class HttpJudge:
    """A judge that scores replies with a model at an OpenAI-compatible endpoint.

    Args:
      endpoint: the client.
      journal: the path of the journal, a file of all requests and answers. Answers in the journal
        are reused for requests with the same model, temperature, maximum length and prompt.
      rubric: the prompt and the scale; default: each role's `eval_prompt`, scores 0 to 3.
      concurrency: the maximum number of requests in progress at the same time.
      rpm, tpm: the maximum numbers of requests and tokens per minute; None: no limit.
      budget: the limit on all requests in the journal, including those of earlier runs; None: no
        limit.
      price: (price of prompts, price of answers) in USD per million tokens, or None. If the
        endpoint returns the cost of an answer, that cost is used instead.
      backoff: the delay in seconds before the first retry of a failed request; default: 0.5. The
        delay doubles with each further retry, up to 30 seconds, and is shortened by a random
        fraction of up to 25 %.

    Raises:
      UserError: a setting is out of range, or `budget` is in USD and `price` is None.

    Examples:
      >>> from jaxpersona.judges.endpoint import Endpoint
      >>> from jaxpersona.judges.http import HttpJudge
      >>> judge = HttpJudge(Endpoint("qwen", url="http://localhost:8000/v1"), "verdicts.jsonl")
      >>> judge.name
      'http qwen rubric cb5451a0 temperature 0 tokens 10'
    """

    def __init__(self, endpoint: Endpoint, journal: str | os.PathLike[str], *,
                 rubric: Rubric = ROLES, concurrency: int = 8, rpm: float | None = None,
                 tpm: float | None = None, budget: Budget | None = None,
                 price: tuple[float, float] | None = None, backoff: float | None = None) -> None:
        if concurrency < 1 or concurrency > 1024:
            raise UserError(f"concurrency is {concurrency}; give an integer from 1 to 1024")
        if backoff is not None and not 0 <= backoff < math.inf:
            raise UserError(f"backoff is {backoff}; give a finite number of seconds, at least 0")
        if price is not None and not all(0 <= x < math.inf for x in price):
            raise UserError(f"price is {price}; give two finite prices in USD per million "
                            "tokens, at least 0")
        if budget is not None and budget.usd is not None and price is None:
            raise UserError("budget is in USD, which needs the price of tokens; give "
                            "--judge-price, or a budget in calls such as 500calls")
        self.endpoint, self.rubric, self.scale = endpoint, rubric, rubric.scale
        self.reads_eval_prompt = rubric.template is None
        self.name = (f"http {endpoint.model} rubric {rubric.digest} temperature "
                     f"{endpoint.temperature:g} tokens {endpoint.max_tokens}")
        self.failed = 0  # number of items that could not be scored
        self._path, self._journal = journal, None
        self._concurrency, self._budget, self._price = concurrency, budget or Budget(), price
        self._pace = Pace(rpm, tpm)
        self._backoff = _BACKOFF if backoff is None else backoff
        self._turn = threading.Condition()  # reentrant lock that guards writes to the fields below
        self._under_way: dict[threading.Event, list[threading.Thread]] = {}
        self._closed = False
        self._flying = self._row = 0
        self._per_byte = 0.5  # tokens per prompt byte: initially a guess, then the observed maximum
        self._why = ""  # the reason why the judge cannot continue
        self._seen = False  # whether an answer contained the number of prompt tokens

    _journal: Journal | None

    @property
    def journal(self) -> Journal:
        """The journal, which is opened on first use.

        Raises:
          UserError: the journal cannot be opened, or the judge was closed.
        """
        with self._turn:
            if self._closed:
                raise UserError(f"the judge {self.endpoint.model} was closed; create a new one")
            if self._journal is None:
                self._journal = Journal(self._path)
            return self._journal

    def note(self) -> str:
        """Describe the requests in the journal (number and cost) and the number of failed items.

        Return "" if the journal is not open yet.
        """
        if self._journal is None:
            return ""
        parts = [f"calls: {self._journal.calls:,}"]
        if self._price is not None or self._journal.spent:
            parts.append(f"cost: ${self._journal.spent:,.4g}")
        if self.failed:
            parts.append(f"failed: {self.failed:,}")
        return ", ".join(parts)

    def close(self) -> None:
        """Stop sending requests, and close the journal and the client.

        The method first waits up to ten seconds for answers to requests in progress.
        """
        with self._turn:
            under_way = list(self._under_way.items())
        for stopped, _ in under_way:
            stopped.set()
        with self._turn:
            self._turn.notify_all()
        _wait([thread for _, threads in under_way for thread in threads])
        with self._turn:
            self._closed = True
            if self._journal is not None:
                self._journal.close()
        self.endpoint.close()

    def score(self, items: Sequence[Item]) -> Iterator[Verdict]:
        """Yield one verdict per item: first those in the journal, then new ones as they arrive.

        Items with equal prompts share one request. If all requests for an item fail, the item's
        verdict has an `error`.

        Raises:
          JudgeStopped: the budget does not allow another request, the endpoint rejects all requests
            or requests a delay of more than `LONGEST_WAIT` seconds, too many consecutive prompts
            failed, or the judge was closed. All finished verdicts are yielded first.
          UserError: the rubric has no template and a role has no `eval_prompt`, or the journal
            cannot be used.
        """
        groups: dict[str, tuple[str, list[Item]]] = {}
        for item in items:
            prompt = self.rubric.prompt(item)
            key = key_of(f"{self.endpoint.model} {self.endpoint.temperature:g} "
                         f"{self.endpoint.max_tokens}", prompt)
            groups.setdefault(key, (prompt, []))[1].append(item)
        open_: queue.SimpleQueue[str] = queue.SimpleQueue()
        left = 0
        for key, (_, members) in groups.items():
            if (known := self.journal.get(key)) is not None:
                yield from self._verdicts(members, *known)
            else:
                open_.put(key)
                left += 1
        if left:
            yield from self._send(groups, open_, left)

    def _send(self, groups: dict[str, tuple[str, list[Item]]], open_: queue.SimpleQueue[str],
              left: int) -> Iterator[Verdict]:
        """Send the requests for the `left` keys in `open_` and yield the verdicts.

        Raises:
          JudgeStopped: as for `score`.
        """
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stopped = threading.Event()
        if self._why:
            stopped.set()

        def work() -> None:
            try:
                while not stopped.is_set():
                    key = open_.get_nowait()
                    done.put((key, self._ask(key, groups[key][0], stopped)))
                    if self._why:
                        raise _Halt
            except queue.Empty:
                pass  # no key is left
            except _Halt:
                stopped.set()
            except BaseException as error:  # raised again in the caller's thread
                stopped.set()
                done.put(error)
            done.put(None)

        threads = [threading.Thread(target=work, daemon=True, name="judge")
                   for _ in range(min(self._concurrency, left))]
        with self._turn:
            self._under_way[stopped] = threads
        for thread in threads:
            thread.start()
        try:
            running, judged = len(threads), 0
            while running:
                found = done.get()
                if found is None:
                    running -= 1
                elif isinstance(found, BaseException):
                    raise found
                else:
                    key, outcome = found
                    judged += 1
                    yield from self._outcome(groups[key][1], outcome)
        finally:
            stopped.set()
            with self._turn:
                self._turn.notify_all()
            _wait(threads)
            with self._turn:
                self._under_way.pop(stopped, None)
        if self._why or judged < left:
            why = self._why or "it was closed before all items were judged"
            raise JudgeStopped(f"the judge {self.endpoint.model} stopped: {why}; all verdicts are "
                               f"kept in {self._path}")

    def _outcome(self, members: list[Item], outcome: tuple[str, float] | str) -> Iterator[Verdict]:
        if isinstance(outcome, str):
            self.failed += len(members)
            yield from (Verdict(item.key, error=outcome) for item in members)
        else:
            yield from self._verdicts(members, *outcome)

    def _verdicts(self, members: list[Item], said: str, cost: float) -> Iterator[Verdict]:
        """Yield the verdicts on items with equal prompts; the first verdict has the whole cost."""
        score, refused = self.rubric.read(said)
        known = self._price is not None or cost > 0
        for i, item in enumerate(members):
            yield Verdict(item.key, score, refused=refused, raw=said,
                          cost=(cost if i == 0 else 0.0) if known else None)

    def _ask(self, key: str, prompt: str, stopped: threading.Event) -> tuple[str, float] | str:
        """Send a prompt up to `ATTEMPTS` times; return (answer, cost) or the last error as text."""
        size = len(prompt.encode("utf-8", "surrogatepass"))
        failure = Failure("")
        for attempt in range(ATTEMPTS):
            if attempt:
                pause = min(self._backoff * 2 ** (attempt - 1), _LONGEST_BACKOFF)
                if stopped.wait(max(pause * random.uniform(0.75, 1.0), failure.after or 0.0)):
                    raise _Halt
            tokens = size * self._per_byte + self.endpoint.max_tokens
            if not self._pace.wait(tokens, stopped):
                raise _Halt
            bound = self._usd(size + _AROUND, self.endpoint.max_tokens)
            self._reserve(key, bound, stopped)
            try:
                reply = self.endpoint.ask(prompt)
            except Failure as error:
                failure = error
                self._pace.settle(tokens, tokens if error.maybe_paid else 0.0)
                with self._turn:
                    self.journal.failed(key, str(error), bound if error.maybe_paid else 0.0)
                    self._landed()
                self._react(error)
                if not error.again:
                    break
            else:
                cost = self._cost(reply, bound)
                with self._turn:
                    self.journal.answered(key, reply.text, cost, prompt_tokens=reply.prompt_tokens,
                                          reply_tokens=reply.reply_tokens)
                    self._landed()
                    self._row = 0
                    if reply.prompt_tokens is not None and size:
                        seen = reply.prompt_tokens / size
                        self._per_byte = max(seen, self._per_byte if self._seen else 0.0)
                        self._seen = True
                if reply.prompt_tokens is not None:
                    after = reply.reply_tokens
                    self._pace.settle(tokens, reply.prompt_tokens + (
                        self.endpoint.max_tokens if after is None else after))
                return reply.text, cost
        with self._turn:
            self._row += 1
            if self._row >= IN_A_ROW:
                self._halt(f"{self._row} prompts in a row failed on every attempt (last error: "
                           f"{failure}); check the endpoint, then run the same command again")
        return str(failure)

    def _react(self, failure: Failure) -> None:
        """Stop the judge or delay all requests, if a failure also affects other requests.

        Raises:
          _Halt: the judge was stopped.
        """
        if failure.fatal:
            with self._turn:
                self._halt(f"{failure}; fix this, then run the same command again")
            raise _Halt
        if failure.after is not None:
            if failure.after > LONGEST_WAIT:
                with self._turn:
                    self._halt(f"the endpoint requests a delay of {failure.after:,.0f} s "
                               f"({failure}); run the same command again later")
                raise _Halt
            self._pace.hold(failure.after)

    def _reserve(self, key: str, bound: float, stopped: threading.Event) -> None:
        """Wait until the budget allows a request, and write the request to the journal.

        Until its actual cost is known, a request counts at the upper bound of its cost. A request
        that does not fit into a budget in USD therefore waits for the requests in progress.

        Raises:
          _Halt: the budget does not allow the request, or the judge was stopped.
        """
        with self._turn:
            while not stopped.is_set():
                held = self.journal
                if self._budget.allows(held.calls + 1, held.spent + bound):
                    held.sent(key, bound)
                    self._flying += 1
                    return
                if not self._flying or not self._budget.allows(held.calls + 1, 0.0):
                    why = (f"the next request, which may cost up to ${bound:,.4g}, does not fit "
                           f"into the budget of {self._budget}"
                           if self._budget.allows(held.calls + 1, held.spent)
                           else f"the budget of {self._budget} is used up")
                    self._halt(f"{why} (calls: {held.calls:,}"
                               + (f", cost: ${held.spent:,.4f}" if held.spent else "")
                               + "); to continue, give a larger --budget and run the same command "
                                 "again")
                    break
                self._turn.wait(0.5)
        raise _Halt

    def _landed(self) -> None:
        """Mark one request as finished and wake waiting threads; the caller must hold `_turn`."""
        self._flying -= 1
        self._turn.notify_all()

    def _halt(self, why: str) -> None:
        self._why = self._why or why

    def _usd(self, before: float, after: float) -> float:
        if self._price is None:
            return 0.0
        return (before * self._price[0] + after * self._price[1]) / 1e6

    def _cost(self, reply: Reply, bound: float) -> float:
        """Return the cost of an answer in USD.

        If the endpoint returned no cost, the cost is computed from the token counts and the price.
        If the endpoint returned only one of the token counts or none, the cost is `bound`.
        """
        if reply.usd is not None:
            return reply.usd
        if reply.prompt_tokens is None or reply.reply_tokens is None:
            return bound
        return self._usd(reply.prompt_tokens, reply.reply_tokens)


def _wait(threads: Sequence[threading.Thread]) -> None:
    """Wait for threads to end, for at most `_GRACE` seconds in total."""
    end = time.monotonic() + _GRACE
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))


class _Halt(Exception):
    """Raised to end a thread of `HttpJudge` without a verdict."""
