"""A judge that uses an OpenAI-compatible endpoint, with rate limits and a budget.

Each request is written to a journal (`journal.Journal`) before it is sent, and each answer before
it is used. A killed process therefore loses at most the answers to requests in progress.
"""

from __future__ import annotations

import math
import os
import pathlib
import queue
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from jaxpersona.brief import line, quoted
from jaxpersona.errors import UserError
from jaxpersona.judges.batch import Batches
from jaxpersona.judges.endpoint import Endpoint, Failure
from jaxpersona.judges.journal import Journal, key_of
from jaxpersona.judges.limits import ATTEMPTS, IN_A_ROW, LONGEST_WAIT, Batch, Budget, Pace, Tariff
from jaxpersona.judges.protocol import Item, JudgeStopped, Verdict
from jaxpersona.judges.rubric import ROLES, Rubric
from jaxpersona.judges.waiting import join, pause

_BACKOFF = 0.5  # delay in seconds before the first retry


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
      price: (price of prompts, price of answers) in USD per million tokens, or None; `batch.price`
        takes precedence. If the endpoint returns the cost of an answer, that cost is used instead.
      backoff: the delay in seconds before the first retry of a failed request; default: 0.5. The
        delay doubles with each further retry, up to 30 seconds, and is shortened by a random
        fraction of up to 25 %.
      batch: settings of the batch interface, with which requests are sent in batches that take up
        to 24 hours; None: single requests. Answers in the journal are reused in both cases.
        `concurrency`, `rpm` and `tpm` apply only to single requests.

    Raises:
      UserError: a setting is out of range, or `budget` is in USD and no price is given.

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
                 price: tuple[float, float] | None = None, backoff: float | None = None,
                 batch: Batch | None = None) -> None:
        if concurrency < 1 or concurrency > 1024:
            raise UserError(f"concurrency is {concurrency}; give an integer from 1 to 1024")
        if backoff is not None and not 0 <= backoff < math.inf:
            raise UserError(f"backoff is {backoff}; give a finite number of seconds, at least 0")
        if batch is not None and batch.price is not None:
            price = batch.price
        if budget is not None and budget.usd is not None and price is None:
            raise UserError("budget is in USD, which needs the price of tokens; give "
                            "--judge-price, or a budget in calls such as 500calls")
        self.endpoint, self.rubric, self.scale = endpoint, rubric, rubric.scale
        self.reads_eval_prompt = rubric.template is None
        self.name = (f"http {endpoint.model} rubric {rubric.digest} temperature "
                     f"{endpoint.temperature:g} tokens {endpoint.max_tokens}")
        self._identity = f"{endpoint.model} {endpoint.temperature:g} {endpoint.max_tokens}"
        self.failed = 0  # number of items that could not be scored
        self.path, self._journal = pathlib.Path(journal), None
        self._concurrency, self._budget = concurrency, budget or Budget()
        self._price, self._tariff = price, Tariff(price, endpoint.max_tokens)
        self._pace = Pace(rpm, tpm)
        self._backoff = _BACKOFF if backoff is None else backoff
        self.after = batch is not None  # batches begin after all replies of a run are generated
        self._batches = None if batch is None else Batches(
            batch, endpoint, self._tariff, self._budget, self._backoff)
        self._turn = threading.Condition()  # reentrant lock that guards writes to the fields below
        self._under_way: dict[threading.Event, list[threading.Thread]] = {}
        self._closed = False
        self._flying = self._row = 0
        self._per_byte = 0.5  # tokens per prompt byte: initially a guess, then the observed maximum
        self._why = ""  # the reason why the judge cannot continue
        self._seen = False  # whether an answer contained the number of prompt tokens

    _journal: Journal | None

    def __repr__(self) -> str:
        return line("HttpJudge", quoted(self.endpoint.model), quoted(self.endpoint.url),
                    f"rubric {self.rubric.digest}")

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
                self._journal = Journal(self.path)
            return self._journal

    def begin(self) -> None:
        """Open the journal; raise the errors of `journal` before anything is generated."""
        _ = self.journal

    def note(self) -> str:
        """Describe the calls, costs, batches and failed items; "" if no journal is open."""
        if self._journal is None:
            return ""
        parts = [f"calls: {self._journal.calls:,}"]
        if self._price is not None or self._journal.spent:
            parts.append(f"cost: ${self._journal.spent:,.4g}")
        if self._batches is not None and (about := self._batches.note()):
            parts.append(about)
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
        if self._batches is not None:
            self._batches.stop()
        with self._turn:
            self._turn.notify_all()
        join([thread for _, threads in under_way for thread in threads])
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
            failed, a request is in an unfinished batch and `batch` is None, or the judge was
            closed. All finished verdicts are yielded first.
          UserError: the rubric has no template and a role has no `eval_prompt`, or the journal
            cannot be used.
        """
        groups: dict[str, tuple[str, list[Item]]] = {}
        for item in items:
            prompt = self.rubric.prompt(item)
            groups.setdefault(key_of(self._identity, prompt), (prompt, []))[1].append(item)
        if self._batches is not None:
            yield from self._in_batches(self._batches, groups)
            return
        open_: queue.SimpleQueue[str] = queue.SimpleQueue()
        left = 0
        for key, (_, members) in groups.items():
            if (known := self.journal.get(key)) is not None:
                yield from self._verdicts(members, *known)
            else:
                open_.put(key)
                left += 1
                if (held := self.journal.batch_of(key)) is not None:
                    self._halt(f"requests are in the unfinished batch {held.id or held.name}; add "
                               "--judge-batch to get its results")
        if left:
            yield from self._send(groups, open_, left)

    def prepare(self, items: Callable[[], Iterable[Item]],
                tick: Callable[[], None] = lambda: None) -> None:
        """Get the answers to all items in batches, so that `score` takes them from the journal.

        The method returns when all batches have ended or the judge cannot continue. Without the
        argument `batch`, it returns immediately.

        Args:
          items: a function that returns the items, of any number of roles; it is called several
            times.
          tick: a function that is called at least once per second.

        Raises:
          UserError: as for `score`. If the judge cannot continue, `score` raises `JudgeStopped`.
        """
        if self._batches is not None and next(iter(items()), None) is not None:
            self._batches.failures.clear()
            self._batches.run(self.journal, lambda: (
                (key_of(self._identity, prompt), prompt)
                for prompt in map(self.rubric.prompt, items())), tick)

    def _in_batches(self, batches: Batches, groups: dict[str, tuple[str, list[Item]]],
                    ) -> Iterator[Verdict]:
        """Yield the verdicts on items whose requests are sent in batches.

        Raises:
          JudgeStopped: as for `score`.
        """
        found = batches.outcomes(self.journal, groups)
        for key, outcome in found.items():
            yield from self._outcome(groups[key][1], outcome)
        if len(found) < len(groups):
            self._stop(batches.why)

    def _stop(self, why: str) -> NoReturn:
        why = why or "it was closed before all items were judged"
        raise JudgeStopped(f"the judge {self.endpoint.model} stopped: {why}; all verdicts are kept "
                           f"in {self.path}")

    def _send(self, groups: dict[str, tuple[str, list[Item]]], open_: queue.SimpleQueue[str],
              left: int) -> Iterator[Verdict]:
        """Send the requests for the keys in `open_` (their number is `left`); yield the verdicts.

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
            except queue.Empty:  # no key is left
                pass
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
            join(threads)
            with self._turn:
                self._under_way.pop(stopped, None)
        if self._why or judged < left:
            self._stop(self._why)

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
                delay = pause(self._backoff, attempt) * random.uniform(0.75, 1.0)
                if stopped.wait(max(delay, failure.after or 0.0)):
                    raise _Halt
            tokens = size * self._per_byte + self.endpoint.max_tokens
            if not self._pace.wait(tokens, stopped):
                raise _Halt
            bound = self._tariff.bound(prompt)
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
                cost = self._tariff.cost(reply, bound)
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
                    self._halt(self._budget.excess(held.calls, held.spent, bound))
                    break
                self._turn.wait(0.5)
        raise _Halt

    def _landed(self) -> None:
        """Mark one request as finished and wake waiting threads; the caller must hold `_turn`."""
        self._flying -= 1
        self._turn.notify_all()

    def _halt(self, why: str) -> None:
        self._why = self._why or why


class _Halt(Exception):
    """Raised to end a thread of `HttpJudge` without a verdict."""
