"""Judge the rollouts of a run with another judge, and keep the earlier verdicts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from jaxpersona.brief import escaped
from jaxpersona.data.texts import DEFAULT, Role
from jaxpersona.errors import UserError
from jaxpersona.judges.protocol import Item
from jaxpersona.persona.collect import rubric_of
from jaxpersona.persona.judging import Judging
from jaxpersona.persona.verdicts import items_of, outdated_of, verdict_counts
from jaxpersona.progress import shows, steps
from jaxpersona.runs.closing import State, save_verdicts, state_of
from jaxpersona.runs.run import Run

if TYPE_CHECKING:
    from jaxpersona.judges.protocol import Judge


@shows(steps, "report")
def judge_run(folder: str | os.PathLike[str], roles: Sequence[Role], judge: Judge, *,
              report: Callable[[str, int, int, int], None] | bool | None = None,
              ) -> tuple[dict[str, dict[str, int]], float]:
    """Judge the rollouts in a run folder, and store the verdicts in addition to earlier ones.

    Rollouts with a verdict from the same judge, based on the same `eval_prompt`, are not judged
    again, unless the judge failed on them. The axis in the folder is not updated; to compute it
    from the new verdicts, call `extract_axis` with this judge and folder.

    Args:
      folder: the run folder, locked against other processes during the call.
      roles: the roles of the run, with the `eval_prompt` or description that the judge needs. The
        default persona may be omitted.
      judge: the judge.
      report: by default, a call of more than three seconds shows its progress; False shows
        nothing. A function is called instead with ("judging", number of new verdicts, number of
        replies to judge, 0) after each verdict, and while the judge prepares.

    Returns:
      (counts, cost): `counts` maps each role except "default" to its number of replies per score
      (`verdict_counts`), and `cost` is the total cost of the new verdicts in USD.

    Raises:
      UserError: the folder contains no run or is in use, a role is missing, a file is damaged, or
        the judge cannot continue. Finished verdicts stay in the folder.

    Examples:
      >>> import tempfile
      >>> from jaxpersona.judges.judges import NoJudge
      >>> from jaxpersona.persona.rejudge import judge_run
      >>> try:
      ...     judge_run(tempfile.mkdtemp(), [], NoJudge())
      ... except ValueError as error:
      ...     print(str(error).split(": ")[-1])
      no such file
    """
    found = Run.read(folder)
    known = {role.name: role for role in roles}
    names = [name for name in found.manifest["roles"] if name != DEFAULT]
    if missing := [name for name in names if name not in known]:
        raise UserError(f"{folder}: the run's roles {', '.join(map(escaped, missing[:5]))}"
                        f"{' …' if len(missing) > 5 else ''} are missing from roles; give "
                        "the roles with which the run was started (--roles)")
    about = found.manifest["model"]
    shape = (about["layers"], about["width"])
    manifest = {**found.manifest, "judges": {**found.manifest["judges"], judge.name: {}}}
    with Run.open(folder, manifest) as run:
        left = [len(_state(run, known[name], judge, shape, texts=False).unjudged(name))
                for name in names]
        judging = Judging(judge, alone=False)
        done, total, cost = 0, sum(left), 0.0

        def unjudged() -> Iterator[Item]:
            for name in names:
                state = _state(run, known[name], judge, shape)
                yield from items_of(known[name], [state.records[key]
                                                  for key in state.unjudged(name)])

        def tell() -> None:
            if callable(report):
                report("judging", done, total, 0)

        judging.prepare(unjudged, tell)
        for name in names:
            role, state = known[name], _state(run, known[name], judge, shape)
            keys, rubric = state.unjudged(name), rubric_of(role)
            by = f"{judge.name}/{rubric}"
            for _, key, verdict, price in judging.now(items_of(
                    role, [state.records[key] for key in keys])):
                state.live.judge(by, {key: verdict})
                state.verdicts[key] = verdict
                cost, done = cost + price, done + 1
                tell()
            # verdicts of this call, or of a call that was killed before it saved them
            unsaved = by in state.live.verdicts and not state.live.records
            if unsaved and run.path("rollouts", name).exists():
                save_verdicts(run, name, state, judge.name, rubric)
                state.live.forget(by)
        return {name: verdict_counts(run.verdicts(name, judge.name)) for name in names}, cost


def _state(run: Run, role: Role, judge: Judge, shape: tuple[int, int],
           texts: bool = True) -> State:
    return state_of(run, role.name, judge.name, rubric_of(role), shape, texts=texts,
                    outdated=outdated_of(judge, role))
