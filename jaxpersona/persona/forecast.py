"""A forecast of the cost of an axis run: rollouts, tokens, time, disk space and judged replies."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.data.texts import DEFAULT, Question, Role
from jaxpersona.distributed import processes
from jaxpersona.engine.pace import Pace, measure
from jaxpersona.errors import UserError
from jaxpersona.extras import require
from jaxpersona.persona.axis import LABELS
from jaxpersona.persona.collect import AWAITED, rubric_of
from jaxpersona.persona.prepare import check_prompts, check_redo, check_texts, rollouts_of
from jaxpersona.persona.rounds import rounds_and_quota
from jaxpersona.persona.verdicts import outdated_of
from jaxpersona.runs.closing import state_of
from jaxpersona.runs.manifest import manifest
from jaxpersona.runs.rollouts import Settings, draw_id, generation, planned, rollout_key
from jaxpersona.runs.run import Run
from jaxpersona.runs.sample import KEEP, check_keep
from jaxpersona.text import chat

if TYPE_CHECKING:
    from jaxpersona.judges.protocol import Judge
    from jaxpersona.models.model import Model

_BYTES_PER_TOKEN = 4.5  # average for English text
_GROUPS = 3  # typical number of distinct scores among a role's replies
_SAMPLED = 64  # maximum number of prompts to tokenize for an estimate without a timing run
_TIMED = 256  # minimum number of rollouts to queue for the timed sample, if that many are missing


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The size and the expected cost of an axis run.

    Attributes:
      roles: the number of roles, without the default persona.
      prompts: the number of system prompts, including those of the default persona.
      questions: the number of questions.
      samples: the number of rollouts per prompt and question.
      rollouts: the number of rollouts of the run.
      missing: the number of rollouts that the run folder does not contain yet.
      prompt_tokens: the expected number of prompt tokens of the missing rollouts.
      reply_tokens: the expected number of reply tokens of the missing rollouts; an upper bound if
        nothing was timed, or if no reply of the timed sample was finished.
      seconds: the expected time to generate the missing rollouts, without judging; an upper bound
        if no reply of the timed sample was finished; None if nothing was timed.
      pace: the measurements of the timed sample; None if nothing was timed.
      judged: the number of replies that a judge scores: all but those of the default persona.
      judge_calls: the number of replies that an LLM judge still has to score; 0 for other judges.
      llm_judge: whether the judge is an LLM judge.
      disk_bytes: the expected size of the files that the run will add to the folder.
      live_bytes: the largest size of the response means that the run stores temporarily.
      free_bytes: the free space on the disk of the folder.
      precision: the target reliability of a run with a precision, for which all estimates assume
        that every role is asked all questions; None for a run of all questions.
    """

    __repr__ = brief

    roles: int
    prompts: int
    questions: int
    samples: int
    rollouts: int
    missing: int
    prompt_tokens: int
    reply_tokens: int
    seconds: float | None
    pace: Pace | None
    judged: int
    judge_calls: int
    llm_judge: bool
    disk_bytes: int
    live_bytes: int
    free_bytes: int
    precision: float | None = None

    @property
    def to_pay(self) -> int:
        """The number of replies whose judging costs money: `judge_calls` for an LLM judge.

        For another judge, the number is `judged`, the replies that an LLM judge would score.
        """
        return self.judge_calls if self.llm_judge else self.judged


def forecast(
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
    precision: float | None = None,
    rounds: Sequence[int] | None = None,
    sample_seconds: float = 30.0,
) -> Forecast:
    """Run the checks of `extract_axis` and estimate the cost of a run, without writing files.

    With `precision`, the estimate is an upper bound: the cost of a run that needs all questions.

    Args:
      model, roles, questions, folder, judge, settings, min_count, held_out, keep_means, redo,
        overwrite, precision, rounds: as for `extract_axis`.
      sample_seconds: the time in seconds, excluding compilation, for which missing rollouts are
        generated to measure the speed; 0: nothing is generated.

    Returns:
      The estimates, as a `Forecast`.

    Raises:
      UserError: as for `extract_axis`, or the run has several processes, or `sample_seconds` is
        negative or not finite.

    Examples:
      >>> import jaxpersona as jp
      >>> from jaxpersona.judges.judges import NoJudge
      >>> from jaxpersona.organism import method
      >>> from jaxpersona.persona.forecast import forecast
      >>> found = forecast(jp.load("mini"), method.roles(), method.questions(8), "runs/none",
      ...                  judge=NoJudge(), sample_seconds=0)
      >>> found.rollouts == found.prompts * found.questions
      True
    """
    if processes.many():
        raise UserError("a forecast supports only one process; run it without --distributed")
    if not np.isfinite(sample_seconds) or sample_seconds < 0:
        raise UserError(f"sample_seconds is {sample_seconds}; it must be finite and at "
                        "least 0")
    settings = settings or Settings()
    roles, questions, held_out = check_texts(roles, questions, settings, min_count=min_count,
                                             held_out=held_out, judge=judge)
    require("sklearn", "the axis's principal components need scikit-learn")
    expected = manifest(model, roles, questions, judge.name, settings,
                        check_prompts(model, roles, questions), min_count=min_count,
                        held_out=sorted(held_out), keep_means=keep_means)
    check_redo(redo, roles)
    check_keep(keep_means)
    rounds_and_quota(precision, rounds, questions,
                     getattr(judge, "after", False))
    have, judged_now = _done(Run(folder, expected), [r for r in roles if r.name not in redo],
                             judge, (model.config.n_layers, model.config.d_model), overwrite)
    sizes = rollouts_of(roles, questions, settings)
    missing = [(role.name, record) for role in roles
               for record in planned(role, questions, settings)
               if rollout_key(record) not in have.get(role.name, ())]
    count = len(missing)
    chosen = _spaced(count, min(count, max(_TIMED, 4 * settings.batch_size)))
    talks = [missing[i][1]["conversation"] for i in chosen]
    pace = None
    if sample_seconds and count:
        pace = measure(model, talks, seconds=sample_seconds,
                       ids=[draw_id(model, *missing[i]) for i in chosen],
                       **{k: v for k, v in generation(settings).items() if k != "share_prefix"})
        lengths = pace.prompts
    else:
        lengths = np.array([chat.encode_row(model.tokenizer, talk).tokens.size
                            for talk in talks[:: -(-len(talks) // _SAMPLED) or 1]])
    limit = min(settings.max_new_tokens, model.config.max_context)
    reply = limit if pace is None else pace.mean_length()
    texts = [len(json.dumps(missing[i][1], ensure_ascii=False).encode()) for i in chosen]
    total, judged = sum(sizes.values()), sum(sizes.values()) - sizes[DEFAULT]
    reads = hasattr(judge, "rubric")  # only LLM judges have a rubric
    more = Counter(name for name, _ in missing)
    return Forecast(
        roles=len(roles) - 1, prompts=sum(len(role.prompts) for role in roles),
        questions=len(questions), samples=settings.samples, rollouts=total, missing=count,
        prompt_tokens=round(count * _mean(lengths)), reply_tokens=round(count * reply),
        seconds=None if pace is None else pace.seconds_for(count, count), pace=pace,
        judged=judged, judge_calls=max(judged - judged_now, 0) if reads else 0, llm_judge=reads,
        disk_bytes=_disk_bytes(model, more, keep_means,
                               count * (_mean(texts) + _BYTES_PER_TOKEN * reply),
                               0 if precision is None else len(questions)),
        live_bytes=_live_bytes(model, more, judge),
        free_bytes=shutil.disk_usage(_existing(pathlib.Path(folder))).free, precision=precision,
    )


def _done(run: Run, roles: Sequence[Role], judge: Judge, shape: tuple[int, int], overwrite: bool,
          ) -> tuple[dict[str, set[str]], int]:
    """Verify the run folder, and return its rollouts and number of verdicts, without changing it.

    Returns:
      (a dict from each of `roles` to the keys of its rollouts in the folder, the number of these
      rollouts with a verdict, without the default persona), or ({}, 0) if the folder contains no
      run or the run will be overwritten.

    Raises:
      UserError: the folder contains another run or other files, or a file is damaged.
    """
    run.check_new()
    if run.stored(overwrite) is None or overwrite:
        return {}, 0
    have, judged = {}, 0
    for role in roles:
        state = state_of(run, role.name, judge.name, rubric_of(role), shape, texts=False,
                         repair=False, outdated=outdated_of(judge, role))
        have[role.name] = set(state.records)
        judged += len(state.records) - len(state.unjudged(role.name)) if (
            role.name != DEFAULT) else 0
    return have, judged


def _spaced(count: int, size: int) -> list[int]:
    """Return `size` evenly spaced indices below `count`."""
    return [i * count // size for i in range(size)]


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _disk_bytes(model: Model, more: Mapping[str, int], keep: int | None, text: float,
                questions: int = 0) -> int:
    """Return the expected size in bytes of the files that the missing rollouts will add.

    The files contain the texts, sums, samples and vectors of the roles, and the axis.

    Args:
      model: the model.
      more: role → number of missing rollouts.
      keep: the number of rollouts per role whose response means are stored; None: all.
      text: the expected size of the texts in bytes.
      questions: the number of questions of a run that keeps sums per question, otherwise 0.
    """
    state = model.config.n_layers * model.config.d_model
    size = text + 4 * state  # texts and the axis (float32)
    for name, count in more.items():
        kept = count if keep is None or name == DEFAULT else min(keep, count)
        groups = 1 if name == DEFAULT else min(_GROUPS, count)
        vectors = 1 if name == DEFAULT else 1 + len(LABELS)
        size += state * (2 * kept + 4 + 8 * groups + 4 * vectors)
        size += 4 * model.config.d_model * groups * questions
    return round(size)


def _live_bytes(model: Model, more: Mapping[str, int], judge: Judge) -> int:
    """Return the largest size in bytes of the response means in the live files.

    With a judge whose model is loaded after the rollouts, all roles have live files until then.
    With a judge that runs a model beside the rollouts, a role is judged as soon as it is complete,
    so two roles have live files. With other judges, `AWAITED` + 1 roles may wait for verdicts while
    one more is generated. The roles with the most missing rollouts are counted.
    """
    state = 4 * model.config.n_layers * model.config.d_model
    roles = 2 if getattr(judge, "together", False) else AWAITED + 2
    roles = len(more) if getattr(judge, "after", False) else roles
    return state * sum(sorted(more.values(), reverse=True)[:roles])


def _existing(folder: pathlib.Path) -> pathlib.Path:
    """Return the folder if it exists, or its nearest existing parent."""
    folder = folder.absolute()
    return next((place for place in (folder, *folder.parents) if place.is_dir()), folder)


def describe(found: Forecast, *, judge: str, cost: float | None = None) -> list[str]:
    """Return a forecast as lines of text.

    Args:
      found: the forecast.
      judge: the judge's name.
      cost: the cost of judging one reply, in USD; None: omit the line on cost.
    """
    pace = found.pace
    lines = [
        f"roles: {found.roles:,} besides the default persona, system prompts: {found.prompts:,}",
        f"questions: {found.questions:,}, samples: {found.samples:,}",
        *([] if found.precision is None else [
            f"precision {found.precision:g}: the following numbers are upper bounds, for a run of "
            "all questions; settled roles get fewer"]),
        f"rollouts: {found.rollouts:,}" + (
            "" if found.missing == found.rollouts else
            f", of which the folder contains {found.rollouts - found.missing:,}; the following "
            f"lines are for the other {found.missing:,}"),
        f"prompt tokens: about {found.prompt_tokens:,}",
    ]
    if pace is None:
        lines.append(f"reply tokens: at most {found.reply_tokens:,}")
        lines.append("time: not measured" if found.missing else "time: nothing to generate")
    else:
        bound = "about" if pace.finished.size else "at most"
        lines.append(f"reply tokens: {bound} {found.reply_tokens:,} "
                     f"({pace.mean_length():,.0f} per reply)")
        assert found.seconds is not None
        lines.append(
            f"time of generation: {bound} {hours(found.seconds)} "
            f"(replies in the sample: {pace.finished.size:,} finished, {pace.unfinished.size:,} "
            f"unfinished; {pace.tokens / max(pace.seconds, 1e-9):,.0f} tokens/s over "
            f"{pace.seconds:.1f} s, after {pace.compile_seconds:.0f} s of compilation)")
    calls = (f"the judge {judge} scores {found.judge_calls:,} of the replies"
             if found.judge_calls else f"no model is called (judge {judge})")
    lines.append(f"judging: {calls}; the time above does not include judging")
    if cost is not None:
        whose = "" if found.llm_judge else " all replies of the roles with another judge"
        lines.append(f"cost of judging{whose}: {found.to_pay:,} × ${cost:g} = "
                     f"${found.to_pay * cost:,.2f}")
    lines.append(f"disk: about {size(found.disk_bytes)}, plus {size(found.live_bytes)} during the "
                 f"run; {size(found.free_bytes)} free")
    return lines


def hours(seconds: float) -> str:
    """Return a duration in seconds as text in hours, below two hours also in minutes or seconds.

    If the duration is not finite, the text states that it is unknown.
    """
    if not np.isfinite(seconds):
        return "? hours (unknown, because the sample generated no token; increase its duration)"
    if seconds < 600:
        return f"{seconds / 3600:.3f} hours ({seconds:.0f} s)"
    return f"{seconds / 3600:,.1f} hours" + (f" ({seconds / 60:.0f} min)" if seconds < 7200 else "")


def size(count: float) -> str:
    """Return a number of bytes as text in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
