"""Requests in batches: an OpenAI-compatible endpoint answers a file of requests within 24 hours.

A batch is recorded in the journal before it is submitted, and again with the endpoint's identifier
when it is accepted. A process that is killed at any point therefore finds its batch again: by the
identifier or, if the process was killed between these two records, by the batch's name, which is
part of its metadata. The answers in a batch are recorded like the answers to single requests.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from jaxpersona.judges.endpoint import BatchState, Endpoint, Failure, OtherLength, Reply
from jaxpersona.judges.journal import Journal, Outstanding
from jaxpersona.judges.limits import IN_A_ROW, LONGEST_WAIT, Batch, Budget, Tariff
from jaxpersona.judges.protocol import Item
from jaxpersona.judges.waiting import ABSENT, GRACE, Ended, Waiting

FILE_BYTES = 100_000_000  # maximum size of a batch file in bytes; OpenAI allows 200 MB
_FIRST_POLL = 5.0  # delay in seconds before the first poll; later ones grow up to `Batch.poll`
_GROWTH = 1.5
_QUEUE = "token_limit"  # part of the error code if too many tokens wait at the endpoint
Wanted = Callable[[], Iterable[tuple[str, str]]]  # returns (key, prompt) pairs
Groups = dict[str, tuple[str, list[Item]]]  # key → (prompt, items with this prompt)


class Batches:
    """Sends requests in batches and records their outcomes in a journal.

    Attributes:
      failures: key → error, for requests that failed in this process.
      why: the reason why no further requests are sent, or "".
    """

    def __init__(self, settings: Batch, endpoint: Endpoint, tariff: Tariff, budget: Budget,
                 backoff: float) -> None:
        """Create the object; no request is sent.

        Args:
          settings: the settings of the batch interface.
          endpoint: the client.
          tariff: the costs of the requests.
          budget: the limit on all requests in the journal.
          backoff: the delay in seconds before the first retry of a request about a batch.
        """
        self._settings, self._endpoint = settings, endpoint
        self._tariff, self._budget, self._backoff = tariff, budget, backoff
        self.failures: dict[str, str] = {}
        self.why = ""
        self._wait = Waiting(backoff)
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._told: set[tuple[str, str]] = set()  # (role, key) of items whose failure was returned
        self._states: dict[str, BatchState] = {}  # name of each outstanding batch → last state
        self._length: dict[str, str] = {}  # name of a batch → `Endpoint.length` in its requests
        self._late = self._short = ""  # reasons to submit again after this round
        self._repeat = False  # whether to send requests again with another length field

    def note(self) -> str:
        """Describe the outstanding batches, or return ""."""
        states = list(self._states.values())
        if not states:
            return ""
        named = f"batch {states[0].id}" if len(states) == 1 else f"{len(states)} batches"
        return (f"{named}: {sum(s.done for s in states):,} of {sum(s.total for s in states):,} "
                f"({', '.join(sorted({s.status for s in states}))})")

    def stop(self) -> None:
        """End `run`, which may be running in another thread; wait up to `GRACE` s for its end."""
        self._stopped.set()
        if self._lock.acquire(timeout=GRACE):
            self._lock.release()

    def outcomes(self, journal: Journal, groups: Groups) -> dict[str, tuple[str, float] | str]:
        """Return a dict from each key to its outcome: (answer, cost in USD), or the error as text.

        Requests without an answer in the journal are sent. A failed request is sent again if its
        error was already returned for the same item. If requests cannot be sent, their keys are
        omitted from the result; `why` is the reason, or "" if `stop` was called.
        """
        for key, (_, members) in groups.items():
            named = {(item.role.name, item.key) for item in members}
            if named & self._told:
                self.failures.pop(key, None)
                self._told -= named
        unknown = [key for key in groups if journal.get(key) is None and key not in self.failures]
        if unknown:
            self.run(journal, lambda: [(key, groups[key][0]) for key in unknown])
        found: dict[str, tuple[str, float] | str] = {}
        for key, (_, members) in groups.items():
            if (known := journal.get(key)) is not None:
                found[key] = known
            elif key in self.failures:
                found[key] = self.failures[key]
                self._told |= {(item.role.name, item.key) for item in members}
        return found

    def run(self, journal: Journal, wanted: Wanted,
            tick: Callable[[], None] = lambda: None) -> None:
        """Send all wanted requests that have no outcome, and wait until their batches have ended.

        Requests in outstanding batches of earlier processes are not sent again. If no further
        requests can be sent, `why` is the reason, and some requests may have no outcome.

        Args:
          journal: the journal.
          wanted: a function that returns the requests; it is called several times.
          tick: a function that is called at least once per second.
        """
        with self._lock:
            self._wait = Waiting(self._backoff, tick, self._stopped)
            try:
                self._run(journal, wanted)
            except Ended:  # `_end` stored the reason, or the judge was closed
                pass
            finally:
                self._states.clear()

    def _run(self, journal: Journal, wanted: Wanted) -> None:
        for one in [one for one in journal.batches.values() if not one.open]:
            journal.ended(one.name, "completed")  # an earlier process exited before this record
        if journal.batches:
            held = [journal.batch_of(key) for key, _ in wanted()]
            self._resume(journal, {one.name: one for one in held if one is not None})
        again = True
        while again and not self.why:
            self._late = self._short = ""
            self._repeat = False
            names = self._submit(journal, wanted)
            answered = self._collect(journal, names)
            if self._late and not answered:
                self.why = self.why or self._late
            if self._short and not names:
                self.why = self.why or self._short
            again = self._repeat or bool(self._late or self._short)

    def _resume(self, journal: Journal, held: dict[str, Outstanding]) -> None:
        """Find the identifiers of batches whose acceptance is not recorded.

        Raises:
          Ended: a batch belongs to another endpoint, or the endpoint did not list its batches.
        """
        for one in held.values():
            if one.url and one.url != self._endpoint.url:
                self._end(f"the batch {one.id or one.name} was sent to {one.url}; give this URL "
                          "with --judge-url to get its results")
            if one.id:
                continue
            try:
                state = self._wait.tried(lambda name=one.name: self._endpoint.find_batch(name))
            except Failure as failure:
                if failure.status not in ABSENT:
                    self._end(f"the endpoint did not list its batches ({failure}); check the "
                              "endpoint, then run the same command again")
                # the batch cannot be found; the endpoint may charge for its requests
                self._release(journal, one.name, "the batch was lost", bound=True)
                continue
            if state is None:
                self._release(journal, one.name, "the batch was not submitted")
            else:
                journal.accepted(one.name, state.id, self._endpoint.url)

    def _submit(self, journal: Journal, wanted: Wanted) -> list[str]:
        """Submit batches; return the names of all outstanding batches that contain wanted keys."""
        names: dict[str, None] = {}
        chunk: dict[str, tuple[bytes, float]] = {}
        size, cost = 0, 0.0
        for key, prompt in wanted():
            if (held := journal.batch_of(key)) is not None:
                names[held.name] = None
            if held is not None or self._short or key in chunk or key in self.failures or (
                    journal.get(key) is not None):
                continue
            bound = self._tariff.bound(prompt)
            if not self._budget.allows(journal.calls + len(chunk) + 1,
                                       journal.spent + cost + bound):
                self._short = self._budget.excess(journal.calls + len(chunk),
                                                  journal.spent + cost, bound)
                continue  # later keys may be in outstanding batches
            line = self._endpoint.request(key, prompt)
            if chunk and (len(chunk) == self._settings.size or size + len(line) > FILE_BYTES):
                names[self._send(journal, chunk)] = None
                chunk, size, cost = {}, 0, 0.0
            chunk[key] = line, bound
            size, cost = size + len(line), cost + bound
        if chunk:
            names[self._send(journal, chunk)] = None
        return [name for name in names if name in journal.batches]

    def _send(self, journal: Journal, chunk: dict[str, tuple[bytes, float]]) -> str:
        """Record a batch, submit it and record its identifier; return its name.

        Raises:
          Ended: the endpoint did not accept the batch, or may have accepted it (`_create`).
        """
        name = secrets.token_hex(8)
        journal.intended(name, self._endpoint.url)
        for key, (_, bound) in chunk.items():
            journal.sent(key, bound, name)
        journal.flush()
        self._wait.tick()
        lines = b"".join(line for line, _ in chunk.values())
        self._length[name] = self._endpoint.length
        try:
            file = self._wait.tried(lambda: self._endpoint.upload(name, lines))
            state = self._create(name, file)
        except Failure as failure:
            self._release(journal, name, str(failure))
            if failure.status in ABSENT:
                self._end(f"the endpoint {self._endpoint.url} does not offer batches (HTTP "
                          f"{failure.status}); omit --judge-batch to send single requests, or "
                          "give an endpoint with batches (--judge-url)")
            self._end(f"the batch was not accepted ({failure}); fix this, then run the same "
                      "command again")
        journal.accepted(name, state.id, self._endpoint.url)
        journal.flush()
        self._states[name] = state
        return name

    def _create(self, name: str, file: str) -> BatchState:
        """Submit an uploaded file; retry only if the endpoint has no batch of this name.

        Raises:
          Failure: the endpoint did not accept the batch.
          Ended: it is unknown whether the endpoint accepted the batch; the journal keeps the batch
            for the next call.
        """
        def once() -> BatchState:
            try:
                return self._endpoint.submit(name, file)
            except Failure as failure:
                if not failure.maybe_paid and (failure.status or 0) < 500:
                    raise
                try:  # the endpoint may have received the request
                    found = self._wait.tried(lambda: self._endpoint.find_batch(name))
                except Failure as other:
                    self._end(f"it is unknown whether the endpoint accepted a batch ({failure}; "
                              f"{other}); run the same command again")
                if found is None:
                    raise
                return found

        return self._wait.tried(once)

    def _collect(self, journal: Journal, names: Sequence[str]) -> int:
        """Wait until batches have ended, and record their outcomes; return the number of answers.

        Raises:
          Ended: the endpoint does not return the state or the results of a batch.
        """
        left, pause, answered, failed = list(names), _FIRST_POLL, 0, 0
        while left:
            pause = min(pause, self._settings.poll)
            delay = 0.0
            for name in list(left):
                held = journal.batches[name]
                try:
                    state = self._states[name] = self._endpoint.batch(held.id)
                    if state.ended:
                        answered += self._record(journal, held, state)
                        left.remove(name)
                        del self._states[name]
                    failed = 0
                except Failure as failure:
                    failed += 1
                    delay = max(delay, failure.after or 0.0)
                    if failure.fatal or not failure.again or failed >= IN_A_ROW or (
                            delay > LONGEST_WAIT):
                        self._end(f"the endpoint does not return the batch {held.id} ({failure}); "
                                  "check the endpoint, and use the API key with which the batch "
                                  "was sent, then run the same command again. To start over, give "
                                  "another file with --judge-cache")
            if left:
                self._wait.wait(max(pause, delay))
                pause *= _GROWTH
        return answered

    def _record(self, journal: Journal, held: Outstanding, state: BatchState) -> int:
        """Record the outcomes of a batch that has ended; return the number of answers.

        Lines without a known custom_id are ignored. If several lines have the same custom_id, only
        the first one counts.

        Raises:
          Failure: a download failed, unless the reason is that the endpoint has deleted the file.
        """
        found: dict[str, Reply | Failure] = {}
        unread = False
        other = self._length.get(held.name, "max_tokens") == "max_tokens"
        for file in state.files:
            try:
                data = self._endpoint.download(file)
            except Failure as failure:
                if failure.status not in (404, 410):
                    raise
                unread = True  # the endpoint has deleted the file
                continue
            for line in filter(None, map(bytes.strip, data.split(b"\n"))):
                one = self._endpoint.outcome(line)
                if one is None or one[0] not in held.members:
                    unread = True
                else:
                    found.setdefault(*one)
        # a request without a result may be charged if a result is unreadable or the batch completed
        missing = Failure(f"the batch has no result for this reply (status: {state.status}"
                          f"{f', {state.problems}' if state.problems else ''})",
                          maybe_paid=unread or state.status == "completed")
        answers, unsent, last = 0, 0, ""
        failures: dict[str, str] = {}
        for key, bound in list(held.open.items()):
            outcome = found.get(key, missing)
            if isinstance(outcome, Reply):
                journal.answered(key, outcome.text, self._tariff.cost(outcome, bound),
                                 prompt_tokens=outcome.prompt_tokens,
                                 reply_tokens=outcome.reply_tokens)
                answers += 1
                continue
            last = str(outcome)
            journal.failed(key, last, bound if outcome.maybe_paid else 0.0)
            if other and isinstance(outcome, OtherLength):
                self._repeat = True
                unsent += 1  # the endpoint processed nothing, and the request is sent again
            else:
                unsent += outcome is missing and state.status == "failed" and not unread
                failures[key] = last
        journal.ended(held.name, state.status, unsent)
        if state.status == "failed" and _QUEUE in state.problems:
            self._late = (f"the batch {state.id} failed ({state.problems}); run the same command "
                          "again later, or give a smaller --judge-batch-size")
        elif state.status == "failed":
            self.why = (f"the batch {state.id} failed ({state.problems or 'no reason given'}); fix "
                        "this, then run the same command again")
        elif not answers and len(failures) >= IN_A_ROW:
            self.why = (f"all requests of the batch {state.id} failed (last error: {last}); check "
                        "the endpoint, then run the same command again")
        else:
            self.failures |= failures
        return answers

    def _release(self, journal: Journal, name: str, error: str, *, bound: bool = False) -> None:
        """Record that the requests of a batch have no answer, so that they may be sent again.

        Args:
          journal: the journal.
          name: the name of the batch.
          error: the reason.
          bound: whether the endpoint may charge for the requests; if false, they do not count as
            calls.
        """
        left = dict(journal.batches[name].open)
        for key, cost in left.items():
            journal.failed(key, error, cost if bound else 0.0)
        journal.ended(name, "lost" if bound else "unsent", 0 if bound else len(left))

    def _end(self, why: str) -> NoReturn:
        """Stop sending requests.

        Raises:
          Ended: always.
        """
        self.why = self.why or why
        raise Ended
