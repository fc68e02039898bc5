"""Extract the Assistant Axis of a model: rollouts → judge → role vectors → axis → thresholds.

Rollouts, verdicts and sums are saved in a run folder. An interrupted run can be resumed, and then
gives the same results as an uninterrupted run. A call with more roles or questions, or with another
judge, reuses the rollouts in the folder. All existing files are verified before the first rollout
is generated; a damaged file raises UserError.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import shown
from jaxpersona.ckpts.vectors import save_vector
from jaxpersona.data.texts import DEFAULT, Question, Role
from jaxpersona.distributed import processes
from jaxpersona.errors import UserError
from jaxpersona.extras import require
from jaxpersona.models.int8 import weights_note
from jaxpersona.persona import axis as science
from jaxpersona.persona.bootstrap import averaged_rows, pca_intervals
from jaxpersona.persona.collect import Collection, Report
from jaxpersona.persona.extraction import Extraction, save_analysis
from jaxpersona.persona.prepare import check_prompts, check_redo, check_texts
from jaxpersona.persona.rounds import Rounds, collect, measured, rounds_and_quota
from jaxpersona.persona.thresholds import percentiles_of
from jaxpersona.persona.unequal import (
    cells_of,
    corrected,
    correction,
    merged_cells,
    order_of,
    questions_of,
)
from jaxpersona.persona.verdicts import verdict_counts
from jaxpersona.progress import shows, steps
from jaxpersona.runs.manifest import manifest
from jaxpersona.runs.older import Older
from jaxpersona.runs.rollouts import Settings
from jaxpersona.runs.run import Run
from jaxpersona.runs.sample import KEEP, check_keep
from jaxpersona.runs.sums import EMPTY, Sums
from jaxpersona.vectors.vector import Axis

if TYPE_CHECKING:
    from jaxpersona.judges.protocol import Judge
    from jaxpersona.models.model import Model

__all__ = ["Extraction", "extract_axis"]
Notice = Callable[[str], None]


@shows(steps, "report")
def extract_axis(
    model: Model,
    roles: Sequence[Role],
    questions: Sequence[Question],
    folder: str | os.PathLike[str],
    *,
    judge: Judge,
    settings: Settings | None = None,
    min_count: int = 10,
    held_out: Sequence[str] = (),
    keep_means: int | None = KEEP,
    redo: Sequence[str] = (),
    overwrite: bool = False,
    take_from: str | os.PathLike[str] | None = None,
    precision: float | None = None,
    rounds: Sequence[int] | None = None,
    report: Report | bool | None = None,
    notice: Notice | None = None,
) -> Extraction:
    """Extract a model's Assistant Axis, reusing the results in the run folder.

    If the folder contains a run of the same model, settings and device, its rollouts and verdicts
    are reused. The judge, roles, questions, `min_count` and `held_out` may differ from the values
    in earlier calls. If the judge differs, response means that are not stored are recomputed from
    the replies, in batched forward passes.

    The axis is written to `axis.safetensors` in the folder, and its statistics to `analysis.json`.
    If the judge fails on some replies, a warning is issued, and no vector includes these replies.

    The vectors average all rollouts of the roles in the folder. If roles have rollouts of different
    questions, for example after a call with `precision`, the vectors are corrected for this
    (`persona.unequal`); a warning is issued if the folder lacks the data.

    Args:
      model: the model to analyze.
      roles: the roles, one of them named "default".
      questions: the questions, each of which is combined with every prompt of every role.
      folder: the run folder, locked against other processes during the call.
      judge: the judge, which scores the rollouts of all roles except "default".
      settings: the sampling settings of the rollouts; default: `Settings()`.
      min_count: the number of rollouts with score 3 that a role needs to be included in the axis.
      held_out: names of roles that are generated and judged, but included neither in the axis nor
        in the thresholds.
      keep_means: the number of rollouts per role whose response means are stored, to compute the
        thresholds; None: all. All response means of the default persona are stored.
      redo: names of roles whose files are deleted and whose rollouts are regenerated, for example
        because files are damaged.
      overwrite: whether to delete any existing run in the folder and start a new one.
      take_from: the folder of a run in the older format 2 with the same model, settings and device.
        Its rollouts are copied instead of being generated again; this folder is not changed.
      precision: the reliability, between 0 and 1, at which the axis or a role's vector is settled
        (`persona.precision`). The rollouts are generated in rounds; settled roles get no further
        questions. The default persona is asked all questions of which a role has rollouts.
        Default: all roles are asked all questions.
      rounds: the number of questions after each round, such as [8, 16, 32], in ascending order;
        with `precision` only. Default: `precision.rounds_of`.
      report: by default, a call of more than three seconds shows its progress; False shows
        nothing. A function is called instead with ("rollouts", number of finished rollouts, total
        number of rollouts, number of generated tokens) and with ("judging", number of judged
        replies, total number of replies to judge, 0). With `precision`, the totals include only
        the rounds up to the current one.
      notice: a function that is called with a line of text for each difference in roles, questions
        or arguments from the previous call, and after each round.

    Returns:
      The axis with its thresholds, the role vectors, the projections and the numbers of replies
      per score, as an `Extraction`.

    Raises:
      UserError: an argument is invalid, for example because `roles` has no "default" or a role name
        is not valid as a file name; a prompt does not fit into the context; scikit-learn is not
        installed; the folder belongs to another run, contains other files, cannot be written or is
        in use; `take_from` is not a matching run of format 2; a file is damaged; activations are
        not finite; the judge cannot continue; all replies of the default persona are empty; or
        fewer than two roles that are not held out have `min_count` rollouts with score 3.
    """
    settings = settings or Settings()
    roles, questions, held_out = check_texts(roles, questions, settings, min_count=min_count,
                                             held_out=held_out, judge=judge)
    if not (isinstance(getattr(judge, "name", None), str) and hasattr(judge, "score")):
        raise UserError(f"judge is {shown(judge, 60)}; give an object with name, scale and "
                        "score(items), such as NoJudge()")
    check_redo(redo, roles)
    check_keep(keep_means)
    sizes, quota = rounds_and_quota(precision, rounds, questions,
                                     getattr(judge, "after", False))
    # raise an error about a missing package before hours of generation, not after
    require("sklearn", "the axis's principal components need scikit-learn")
    expected = manifest(model, roles, questions, judge.name, settings,
                        check_prompts(model, roles, questions), min_count=min_count,
                        held_out=sorted(held_out), keep_means=keep_means, **quota)
    older = None if take_from is None else Older(take_from)
    if older is not None:
        older.check(expected)
    processes.warn_of_deadlock()
    with contextlib.ExitStack() as stack:
        run = processes.in_turn(
            lambda: stack.enter_context(Run.open(folder, expected, processes.index(),
                                                 overwrite=overwrite)))
        tell = notice if notice is not None and processes.first() else (lambda _: None)
        for line in run.notices:
            tell(line)
        for i, role in enumerate(roles):
            if role.name in redo and processes.owns(i):
                run.discard(role.name)
        given: dict[str, Any] = {"keep": keep_means, "older": older,
                                 "report": report if callable(report) else None}
        if precision is None:
            found = None
            work = Collection(model, run, roles, {role.name: questions for role in roles}, judge,
                              settings, **given)
            work.work()
        else:
            work, found = collect(model, run, roles, questions, judge, settings,
                                  precision=precision, rounds=sizes, min_count=min_count,
                                  held_out=held_out, notice=tell, **given)
        if work.status.failed and processes.first():
            text = (f"replies on which the judge failed: {work.status.failed:,} "
                    f"({work.failures[:120]}); no vector includes these replies; run the same "
                    "command again to judge them")
            warnings.warn(text, stacklevel=3)
        work.status.write("complete")
        return axis_of(model, run, roles, judge, min_count, held_out, work.status.tokens, found,
                       warn=lambda text: warnings.warn(text, stacklevel=5))


def axis_of(model: Model, run: Run, roles: Sequence[Role], judge: Judge, min_count: int,
            held_out: Sequence[str], tokens: int, rounds: Rounds | None = None, *,
            warn: Notice) -> Extraction:
    """Compute the axis from the sums of response means in a run folder, and write the results.

    `warn` is called with a sentence if roles were asked different questions and their vectors
    cannot be corrected for this (`persona.unequal`).

    Raises:
      UserError: all replies of the default persona are empty, or fewer than two roles that are not
        held out have `min_count` rollouts with score 3.
    """
    names = [role.name for role in roles]
    owned = [name for i, name in enumerate(names) if processes.owns(i)]
    vectors: dict[str, dict[str, tuple[np.ndarray, int]]] = {}
    sizes: dict[str, tuple[int, int]] = {}  # role → (rollouts, rollouts with a non-empty reply)
    counts: dict[str, dict[str, int]] = {}
    summed = {name: _sums(run, name, judge.name) for name in owned}
    asked = processes.merge({name: questions_of(run, name, judge.name, sums)
                             for name, sums in summed.items()})
    cells = None
    if rounds is not None or len({frozenset(some) for some in asked.values()}) > 1:
        order = order_of(asked, run.manifest["arguments"]["seed"])
        cells = merged_cells({name: cells_of(sums, name, order, asked[name])
                              for name, sums in summed.items()})
    change = correction(run, asked, cells, owns_default=DEFAULT in summed)
    if change.problem and processes.first():
        warn(change.problem)
    for name, sums in summed.items():
        vectors[name] = corrected(sums.vectors(science.LABELS), change.shifts.get(name))
        verdicts = run.verdicts(name, judge.name)
        whole = len(sums.groups) if verdicts is None else len(verdicts["scores"])
        sizes[name] = whole, len(sums.groups) - sums.count(EMPTY)
        if name != DEFAULT:
            counts[name] = verdict_counts(verdicts)
    vectors, sizes = _in_order(vectors, names), _in_order(sizes, names)
    counts = _in_order(counts, [name for name in names if name != DEFAULT])
    if "mean" not in vectors[DEFAULT]:
        raise UserError("every reply of the default persona is empty; the axis needs at least one "
                        "non-empty reply")
    default = vectors[DEFAULT]["mean"][0]
    role_means = {
        name: by_label["pos_3"][0]
        for name, by_label in vectors.items()
        if name != DEFAULT and by_label.get("pos_3", (None, 0))[1] >= min_count
    }
    used = {name: vector for name, vector in role_means.items() if name not in held_out}
    if len(used) < 2:
        raise UserError(
            f"too few roles have at least {min_count} rollouts with score 3 from the judge "
            f"{judge.name!r} and are not held out: {len(used)} of {len(names) - 1}; the axis needs "
            f"at least two such roles. {run.folder} keeps all rollouts and verdicts: use the same "
            "folder with more questions, a lower min_count, or another judge")
    if rounds is not None:
        assert cells is not None and change.slope is not None
        rounds = measured(rounds, asked, cells, list(used), change.slope)
    for name in owned:  # not before the check above, so that files of an earlier axis are kept
        run.save_vectors(name, vectors[name])
    analysis = science.analyse(default, used)
    projections, stored = {}, {}
    middle = len(analysis.axis) // 2
    for name in owned:
        sample = run.sample(name)
        every = sample.means
        projections[name] = science.project(every, analysis.axis)
        if name in used or name == DEFAULT:
            rows = averaged_rows(sample, run.scores(name, judge.name))
            stored[name] = every[rows, middle : middle + 1]
    projections = _in_order(projections, names)
    bars = None if processes.many() else pca_intervals(
        default[middle : middle + 1], {n: v[middle : middle + 1] for n, v in used.items()},
        {name: len(means) for name, means in stored.items()},
        {name: vectors[name]["mean" if name == DEFAULT else "pos_3"][1] for name in stored},
        lambda name, _: stored[name])
    means = {name: science.project(by_label["mean"][0][None], analysis.axis)[0]
             if "mean" in by_label else np.full(len(analysis.axis), np.nan, np.float32)
             for name, by_label in vectors.items()}
    finite = {name: kept for name, (_, kept) in sizes.items()}
    table, intervals = {}, {}
    for of, pooled in (("default", [DEFAULT]), ("all", [n for n in names if n not in held_out])):
        table[of], intervals[of] = percentiles_of({n: projections[n] for n in pooled}, finite)
    rollouts = sum(sizes[n][0] for n in names)
    axis = Axis(
        values=analysis.axis, name="assistant", model=model.name, fingerprint=model.fingerprint,
        percentiles=table,
        notes={"judge": judge.name, "roles": len(used), "min_count": min_count,
               "default_rollouts": sizes[DEFAULT][0],
               "rollouts": sum(sizes[n][0] for n in names if n not in held_out),
               **weights_note(model.params)},
    )
    found = Extraction(axis, analysis, default, role_means, projections, counts, rollouts, tokens,
                       means, {name: n for name, (n, _) in sizes.items()}, intervals, rounds, bars)
    if processes.first():
        save_vector(run.folder / "axis.safetensors", axis)
        save_analysis(run.folder, found, held_out)
    return found


def _sums(run: Run, name: str, judge: str) -> Sums:
    found = run.sums(name, judge)
    assert found is not None, f"{name} is not closed"
    return found


def _in_order(owned: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the entries of all processes in the order of `names`, for reproducible float sums."""
    merged = processes.merge(owned)
    return {name: merged[name] for name in names}
