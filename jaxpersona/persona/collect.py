"""Generate and judge the rollouts of a run, in one stream over all roles.

Finished rollouts and verdicts are immediately appended to the live files of their role. As soon as
all rollouts of a role have been generated and judged, the role is closed (`runs.closing`): its
response means are added to sums by score.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxpersona.data.texts import DEFAULT, Question, Role
from jaxpersona.distributed import processes
from jaxpersona.engine.replies import Reply
from jaxpersona.engine.stream import Stream
from jaxpersona.errors import UserError
from jaxpersona.judges.protocol import Item, Judge
from jaxpersona.persona.judging import Found, Judging
from jaxpersona.persona.reread import reply_ids, reread
from jaxpersona.persona.verdicts import items_of, outdated_of
from jaxpersona.runs.closing import PLAIN, State, close, needed, state_of, summed
from jaxpersona.runs.damage import Damaged, remedy
from jaxpersona.runs.older import Older, same
from jaxpersona.runs.rollouts import Settings, draw_id, generation, planned, rollout_key
from jaxpersona.runs.run import Run
from jaxpersona.runs.seal import digest
from jaxpersona.runs.status import Status

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

Report = Callable[[str, int, int, int], None]
# To limit disk use, no rollouts are generated or copied while more than this number of completely
# generated roles wait for verdicts from the judge's thread.
AWAITED = 8
_AHEAD = 2048  # roles in `_ready` wait while at least this many items are sent but not judged
_TOGETHER = 64  # minimum number of new rollouts of an unfinished role that are judged together


class _Found(NamedTuple):
    """The contents of the run folder for one role, at the start of an `extract_axis` call.

    Attributes:
      have: the keys of the planned rollouts that the folder contains.
      closed: whether the role is closed and all rollouts in the folder have a verdict; if sums per
        question are kept, whether the sums contain all planned rollouts and the live files none.
      more: the number of rollouts in the folder that are not planned, such as those of questions
        from an earlier call.
      judged: the number of rollouts with a verdict; 0 for the default persona.
    """

    have: frozenset[str]
    closed: bool
    more: int
    judged: int


class Collection:
    """Generates and judges the missing rollouts of a run, and closes the roles.

    Attributes:
      status: the progress of the run.
      failures: the error message for one of the replies on which the judge failed; "" if the judge
        failed on none.
    """

    def __init__(self, model: Model, run: Run, roles: Sequence[Role],
                 questions: Mapping[str, Sequence[Question]], judge: Judge, settings: Settings, *,
                 keep: int | None, older: Older | None = None, report: Report | None = None,
                 layer: int | None = None, before: Status | None = None) -> None:
        """Verify the run folder and count the missing rollouts.

        Args:
          model, roles, settings: as for `extract_axis`.
          run: the open run.
          questions: role → the questions that the role is asked.
          judge: the judge.
          keep: the number of rollouts per role whose response means are stored; None: all.
          older: a run in an older format from which rollouts are copied, or None.
          report: a function that is called with ("rollouts", number of finished rollouts, total
            number of rollouts, number of generated tokens) and with ("judging", number of judged
            replies, total number of replies to judge, 0).
          layer: the layer at which sums per question are kept, or None. If it is not None, a role
            whose sums include all rollouts of `questions` is not closed again, even if the folder
            contains further rollouts of the role.
          before: the progress of an earlier round of the same call, or None.

        Raises:
          UserError: files are damaged; the message lists all damaged files of all processes.
        """
        self._older = older
        self.model, self.run, self.questions, self.settings = model, run, questions, settings
        self.judge, self.keep, self.failures, self.layer = judge, keep, "", layer
        self.roles = {role.name: role for role in roles}
        self._shape = (model.config.n_layers, model.config.d_model)
        self._owned = {role.name: processes.owns(i) for i, role in enumerate(roles)}
        self._states: dict[str, State] = {}
        self._awaited: dict[str, int] = {}  # role → number of items sent but not judged yet
        self._fresh: dict[str, list[str]] = {}  # role → keys of rollouts not yet sent to the judge
        self._report = report
        size = {role.name: len(role.prompts) * len(questions[role.name]) * settings.samples
                for role in roles}
        found = self._scan()
        self._left = {name: size[name] - len(found[name].have) for name in self.roles}
        self._have = {name: found[name].have for name, left in self._left.items() if left}
        self._ready = deque(name for name, left in self._left.items()
                            if not left and not found[name].closed)
        every = {name: size[name] + found[name].more for name in self.roles}
        self.status = Status(run.folder, total=sum(every.values()), roles=len(every),
                             to_judge=sum(n for name, n in every.items() if name != DEFAULT),
                             write=processes.first(), before=before)
        self.status.done = self.status.total - sum(self._left.values())
        self.status.judged = sum(one.judged for one in found.values())
        self.status.closed = sum(found[name].closed and not left
                                 for name, left in self._left.items())

    def work(self) -> None:
        """Generate and judge all missing rollouts, and close all roles.

        Raises:
          UserError: activations are not finite, or the judge cannot continue. Finished rollouts and
            verdicts stay in the folder.
        """
        judging = Judging(self.judge, alone=not processes.many())
        self.status.begin()
        self._tell()
        try:
            self._work(judging)
        except BaseException:
            with contextlib.suppress(UserError):  # an error here must not hide the first one
                for found in judging.take():
                    self._verdict(found[0], self._state(found[0]), [found])
                self.status.write("stopped")
            raise
        finally:
            judging.close()

    def _work(self, judging: Judging) -> None:
        if self._older is not None:
            self._take_over_all(judging, self._older)
        stream = Stream(self.model, self._asked(), **generation(self.settings))
        tokens = self.status.tokens
        begun = [name for name, have in self._have.items() if have and self._left[name]]
        for name in () if judging.whole else begun:  # send unjudged rollouts of earlier calls
            if self._owned[name]:
                self._put(judging, name, self._state(name).unjudged(name))
        while not stream.done or self._ready or self._awaited:
            if judging.after and stream.done:
                for name in self._ready:
                    self._recover(name)
                judging.after = False
                judging.prepare(self._unjudged, self._tick)
            while self._ready and judging.left < _AHEAD and not judging.after:
                self._played_all(judging, self._ready.popleft())
            waiting = sum(not self._left[name] for name in self._awaited)
            idle = stream.done or waiting > AWAITED
            if not idle:
                finished = stream.step()
                self.status.tokens = tokens + stream.tokens
                for (name, record), reply in finished:
                    self._played(judging, name, record, reply)
                for name in dict.fromkeys(name for (name, _), _ in finished):
                    keys = self._fresh.get(name, ())
                    if keys and (len(keys) >= _TOGETHER or not self._left[name]):
                        self._put(judging, name, self._fresh.pop(name))
                    if not self._left[name] and name not in self._awaited:
                        self._ready.append(name)
                        if judging.after:  # free memory; the role's files are read again later
                            self._states.pop(name, None)
            self._judged(judging.take(0.2 if idle and not self._ready else 0.0))
            self._tell()
            self.status.update()

    def _take_over_all(self, judging: Judging, older: Older) -> None:
        """Copy the missing rollouts of all roles from an older run."""
        for name in list(self._have):
            self._take_over(name, older)
            if not self._left[name] and judging.after:  # judge after all rollouts are generated
                self._ready.append(name)
                self._states.pop(name, None)
            elif not self._left[name]:
                self._played_all(judging, name)
            while len(self._awaited) > AWAITED:
                self._judged(judging.take(0.2))
            self._tell()

    def _take_over(self, name: str, older: Older) -> None:
        """Copy a role's missing rollouts from an older run.

        The scores of the rollouts are copied if the older run has the same judge.
        """
        role, taken = self.roles[name], frozenset()
        if self._owned[name]:
            state, scores = self._state(name), older.scores(name)
            wanted = {rollout_key(r): r for r in self._planned(role)}
            for record, mean in older.rollouts(name):
                key = rollout_key(record)
                if key in state.records or not same(record, wanted.get(key, {})):
                    continue
                state.live.add(record, mean)
                state.records[key] = record
                if older.judge == self.judge.name and key in scores and name != DEFAULT:
                    self._verdict(name, state, [(name, key, {**PLAIN, "score": scores[key]}, 0.0)])
            taken = frozenset(state.records) & frozenset(wanted)
        taken = processes.merge({"taken": taken} if self._owned[name] else {})["taken"]
        self.status.done += len(taken) - len(self._have[name])
        self._left[name] -= len(taken) - len(self._have[name])
        self._have[name] = taken

    def _asked(self) -> Iterator[tuple[tuple[str, dict[str, Any]], Any, int]]:
        """Yield each missing rollout as ((role name, record), conversation, draw id)."""
        for name, role in self.roles.items():
            have = self._have.get(name)  # None if no rollout is missing
            if have is None:
                continue
            for record in self._planned(role):
                if rollout_key(record) not in have:
                    yield (name, record), record["conversation"], draw_id(self.model, name, record)

    def _played(self, judging: Judging, name: str, record: dict[str, Any], reply: Reply) -> None:
        """Append a finished rollout to its role's live files, and queue it for the judge.

        A judge in the caller's thread scores whole roles, so single rollouts are not queued for it.
        A process that does not own the role only counts the rollout.
        """
        self._left[name] -= 1
        self.status.done += 1
        if not self._owned[name]:
            return
        said = {"role": "assistant", "content": reply.text}
        record = record | {"conversation": [*record["conversation"], said],
                           **reply_ids(self.model, reply.text, reply.tokens)}
        state, key = self._state(name), rollout_key(record)
        state.live.add(record, reply.captured["mean"])
        state.records[key] = record
        if not judging.whole and name != DEFAULT and key not in state.verdicts:
            self._fresh.setdefault(name, []).append(key)

    def _put(self, judging: Judging, name: str, keys: Sequence[str]) -> None:
        if keys:
            judging.put(self._items(name, keys))
            self._awaited[name] = self._awaited.get(name, 0) + len(keys)

    def _items(self, name: str, keys: Sequence[str]) -> list[Item]:
        records = self._state(name).records
        return items_of(self.roles[name], [records[key] for key in keys])

    def _unjudged(self) -> Iterator[Item]:
        """Yield the unjudged items of this process in all roles that wait for the judge."""
        for name in self._ready:
            if self._owned[name]:
                yield from self._items(name, self._state(name).unjudged(name))
                self._states.pop(name, None)

    def _recover(self, name: str) -> None:
        """Recompute and store a role's missing response means, before the judge loads its model."""
        state = self._state(name) if self._owned[name] else None
        lost: Any = processes.merge({} if state is None else {
            "lost": needed(state, name, self.layer, unjudged=True)})["lost"]
        for record, mean in zip(lost, reread(self.model, lost), strict=True):
            if state is not None:
                state.live.add(record, mean)
        self._states.pop(name, None)

    def _played_all(self, judging: Judging, name: str) -> None:
        """Judge a role whose rollouts have all been generated, and close the role.

        If the judge runs in its own thread, this method only sends the unjudged rollouts to that
        thread, and `_judged` closes the role later; a role without unjudged rollouts is closed
        immediately. All processes must call this method for the same roles in the same order.
        """
        state = self._state(name) if self._owned[name] else None
        keys = [] if state is None else state.unjudged(name)
        if not judging.whole:
            self._put(judging, name, keys)
            if not keys:
                self._close(name)
            return
        items = [] if state is None else self._items(name, keys)
        given: Any = processes.merge({"items": items} if state is not None else {})["items"]
        if given and (state is not None or getattr(self.judge, "together", False)):
            for found in judging.now(given):
                if state is not None:
                    self._verdict(name, state, [found])
                    self._tell()
        self._close(name)

    def _judged(self, found: Sequence[Found]) -> None:
        """Store verdicts from the judge's thread, and close the roles that they complete."""
        by_role: dict[str, list[Found]] = {}
        for one in found:
            by_role.setdefault(one[0], []).append(one)
        for name, some in by_role.items():
            self._verdict(name, self._state(name), some)
            self._awaited[name] -= len(some)
            if not self._awaited[name]:
                del self._awaited[name]
                if not self._left[name]:
                    self._close(name)

    def _verdict(self, name: str, state: State, found: Sequence[Found]) -> None:
        verdicts = {key: verdict for _, key, verdict, _ in found}
        state.live.judge(f"{self.judge.name}/{rubric_of(self.roles[name])}", verdicts)
        state.verdicts.update(verdicts)
        self.status.cost += sum(cost for *_, cost in found)
        failed = [v["error"] for v in verdicts.values() if v["error"] is not None]
        self.failures = failed[0] if failed else self.failures
        self.status.judged += len(found) - len(failed)
        self.status.failed += len(failed)

    def _close(self, name: str) -> None:
        """Close a role.

        All processes must call this method for the same roles in the same order.
        """
        state = self._state(name) if self._owned[name] else None
        means: Iterator[Any] | None = None
        if processes.many():  # each forward pass needs all processes
            again: Any = processes.merge(
                {} if state is None else {"again": needed(state, name, self.layer)})["again"]
            means = iter(list(reread(self.model, again)))
        if state is not None:
            close(self.run, name, state, judge=self.judge.name,
                  rubric=rubric_of(self.roles[name]), keep=self.keep, seed=self.settings.seed,
                  layer=self.layer,
                  reread=lambda records: reread(self.model, records) if means is None else means)
            del self._states[name]
        self.status.closed += 1

    def _state(self, name: str) -> State:
        if name not in self._states:
            self._states[name] = self._read(name)
        return self._states[name]

    def _read(self, name: str, texts: bool = True) -> State:
        return state_of(self.run, name, self.judge.name, rubric_of(self.roles[name]), self._shape,
                        texts=texts, outdated=outdated_of(self.judge, self.roles[name]))

    def _planned(self, role: Role) -> Iterator[dict[str, Any]]:
        return planned(role, self.questions[role.name], self.settings)

    def _scan(self) -> dict[str, _Found]:
        """Verify the files of all roles, and return a dict from role to `_Found`.

        Raises:
          UserError: files are damaged; the message lists all damaged files of all processes.
        """
        found: dict[str, Any] = {}
        for name, role in self.roles.items():
            if not self._owned[name]:
                continue
            try:
                state = self._read(name, texts=False)
            except Damaged as error:
                found[name] = error.fault
                continue
            keys = {rollout_key(r) for r in self._planned(role)}
            missing = state.unjudged(name)
            judged = 0 if name == DEFAULT else len(state.records) - len(missing)
            closed = (state.closed and not missing if self.layer is None else
                      summed(state, name, keys, self.layer))
            found[name] = _Found(frozenset(keys & set(state.records)), closed,
                                 len(set(state.records) - keys), judged)
        found = processes.merge(found)
        faults = {name: fault for name, fault in found.items() if isinstance(fault, str)}
        if faults:
            raise UserError(f"{'; '.join(faults.values())}; {remedy(sorted(faults))}")
        return {name: found[name] for name in self.roles}

    def _tick(self) -> None:
        self._tell()
        self.status.update()

    def _tell(self) -> None:
        if self._report is None:
            return
        status = self.status
        self._report("rollouts", status.done, status.total, status.tokens)
        if status.to_judge and (status.judged or status.done == status.total):
            self._report("judging", status.judged, status.to_judge, 0)


def rubric_of(role: Role) -> str:
    """Return the digest of a role's `eval_prompt`, which is stored with the role's verdicts."""
    return digest([role.eval_prompt])
