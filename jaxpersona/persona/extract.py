"""Extract the Assistant Axis of a model: rollouts → judge → role vectors → axis → thresholds.

Each step keeps its files in a run folder and is skipped where they are there, so a run that was
stopped goes on and ends in the same bytes. What is there is checked first: a damaged file is named
and refused before anything is generated.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.ckpts.files import write_json
from jaxpersona.ckpts.vectors import save_vector
from jaxpersona.data.texts import Question, Role, all_of
from jaxpersona.distributed import processes
from jaxpersona.engine.sampling import sampling
from jaxpersona.judges.judges import Judge
from jaxpersona.persona import axis as science
from jaxpersona.runs.damage import Damaged, remedy
from jaxpersona.runs.manifest import manifest, tokens_digest
from jaxpersona.runs.names import check_names
from jaxpersona.runs.rollouts import Settings, opening, play
from jaxpersona.runs.run import Run, rollout_key
from jaxpersona.text import chat
from jaxpersona.vectors.vector import Axis

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

Report = Callable[[str, int, int, int], None]
_TOGETHER = 256  # rollouts that are generated in one call, to fill batches across roles


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What an extraction found.

    Attributes:
      axis: with its thresholds.
      analysis: the role vectors it was built from and their principal components.
      default: the default persona's mean [L, D].
      role_means: role → its "pos_3" vector where there were enough, held-out roles included.
      projections: role (with "default") → the projections of its rollouts' response means [n, L].
      counts: role → judged score (as text) → rollouts.
      rollouts, tokens: how many there are in the run; tokens counts those generated now.
    """

    axis: Axis
    analysis: science.Analysis
    default: np.ndarray
    role_means: dict[str, np.ndarray]
    projections: dict[str, np.ndarray]
    counts: dict[str, dict[str, int]]
    rollouts: int
    tokens: int


def extract_axis(
    model: Model,
    roles: Sequence[Role],
    questions: Sequence[Question],
    folder: Any,
    *,
    judge: Judge,
    settings: Settings | None = None,
    min_count: int = 10,
    held_out: Sequence[str] = (),
    redo: Sequence[str] = (),
    report: Report | None = None,
) -> Extraction:
    """Run every step that the folder does not hold yet, and return the axis.

    Args:
      model: the model whose axis it is.
      roles: the roles, one of them named "default".
      questions: asked under every prompt of every role.
      folder: the run folder; while this runs, no other process may write to it.
      judge: scores the roles' rollouts (the default's are not judged).
      min_count: a role's vector needs this many rollouts that fully play it.
      held_out: roles that are played and judged but enter neither axis nor thresholds.
      redo: roles whose files are removed and made anew, as for a damaged one.
      report: called with (step, done, total, tokens).

    Raises:
      ValueError: no default role, unknown held-out roles, a role name that cannot name a file, a
        folder of another run or one that another process writes to, damaged files of a role, or
        too few rollouts that play their role.
    """
    settings = settings or Settings()
    roles, questions = all_of(Role, roles, "roles"), all_of(Question, questions, "questions")
    if isinstance(held_out, str):
        raise ValueError(f"held_out is one string ({held_out!r}); give a list of roles' names")
    held_out = list(held_out)
    names = [role.name for role in roles]
    check_names(names)
    unknown = sorted(set(redo) - set(names))
    if unknown:
        raise ValueError(f"redo names unknown roles {unknown}; the roles are {names[:8]}"
                         + (" …" if len(names) > 8 else ""))
    unknown = sorted(set(held_out) - set(names))
    if "default" not in names or unknown or "default" in held_out:
        raise ValueError(
            f"unknown held-out roles {unknown}" if unknown else
            "roles must hold one named 'default' that is not held out"
        )
    prompts = _check(model, roles, questions, settings, judge, min_count, held_out)
    described = manifest(model, roles, questions, judge, settings, min_count, held_out, prompts)
    processes.warn_of_deadlock()
    with contextlib.ExitStack() as held:
        run = processes.in_turn(
            lambda: held.enter_context(Run.open(folder, described, processes.index())))
        return _extract(model, run, roles, questions, judge, settings, min_count, held_out, redo,
                        report)


def _extract(model: Model, run: Run, roles: Sequence[Role], questions: Sequence[Question],
             judge: Judge, settings: Settings, min_count: int, held_out: Sequence[str],
             redo: Sequence[str], report: Report | None) -> Extraction:
    """Run every step that an open run does not hold yet, and return the axis."""
    names = [role.name for role in roles]
    for i, name in enumerate(names):
        if name in redo and processes.owns(i):
            run.discard(name)
    tokens = _play_missing(model, run, roles, questions, settings, report)
    scores = {role.name: _judge(run, role, judge, mine)
              for role, mine in zip(roles, map(processes.owns, range(len(roles))), strict=True)}
    vectors: dict[str, dict[str, tuple[np.ndarray, int]]] = {}
    means: dict[str, np.ndarray] = {}
    for i, role in enumerate(roles):
        if processes.owns(i):
            means[role.name] = run.means(role.name)
            wanted = (len(scores[role.name]), model.config.n_layers, model.config.d_model)
            if means[role.name].shape != wanted or means[role.name].dtype != np.float32:
                raise ValueError(
                    f"{run.folder}/means/{role.name}.safetensors: damaged, or rollouts/{role.name}"
                    f".jsonl is: it holds {means[role.name].dtype}{list(means[role.name].shape)}, "
                    f"and the rollouts need float32{list(wanted)}; delete both to make them anew")
            vectors[role.name] = science.role_vectors(means[role.name], scores[role.name])
            run.save_vectors(role.name, vectors[role.name])
    vectors = _in_order(vectors, names)
    if "mean" not in vectors["default"]:
        raise ValueError("every reply of the default persona was empty; the axis needs one")
    default = vectors["default"]["mean"][0]
    enough = {
        name: found["pos_3"][0]
        for name, found in vectors.items()
        if name != "default" and found.get("pos_3", (None, 0))[1] >= min_count
    }
    used = {name: vector for name, vector in enough.items() if name not in held_out}
    if len(used) < 2:
        raise ValueError(
            f"{len(used)} of {len(names) - 1} roles have {min_count} rollouts that fully play "
            "them; the axis needs two: ask more questions, lower min_count, or use another judge"
        )
    analysis = science.analyse(default, used)
    projections = _in_order(
        {name: science.project(value, analysis.axis) for name, value in means.items()}, names)
    everyone = np.concatenate([projections[n] for n in names if n not in held_out])
    axis = Axis(
        values=analysis.axis, name="assistant", model=model.name, fingerprint=model.fingerprint,
        percentiles={
            "default": science.percentiles(projections["default"]),
            "all": science.percentiles(everyone),
        },
        notes={"judge": judge.name, "roles": len(used), "min_count": min_count,
               "default_rollouts": len(projections["default"]), "rollouts": len(everyone)},
    )
    counts = {name: _count(values) for name, values in scores.items() if name != "default"}
    if processes.first():
        save_vector(run.folder / "axis.safetensors", axis)
        _save_analysis(run, analysis, projections, counts, held_out)
    total = sum(len(value) for value in projections.values())
    return Extraction(axis, analysis, default, enough, projections, counts, total, tokens)


def _check(model: Model, roles: Sequence[Role], questions: Sequence[Question], settings: Settings,
           judge: Judge, min_count: int, held_out: Sequence[str]) -> str:
    """Refuse what cannot end well, before a folder is made or a token generated.

    Returns:
      A digest of the tokens of every prompt and of every question.
    """
    sampling(1, temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed)
    if min_count < 1:
        raise ValueError(f"min_count is {min_count}; it must be positive")
    if not questions:
        raise ValueError("questions is empty; give at least one")
    twice = [i for i, n in Counter(question.id for question in questions).items() if n > 1]
    if twice:
        raise ValueError(f"question id {twice[0]} is given more than once; rollouts are known by "
                         "it: give every question an id of its own")
    most = sorted(len(role.prompts) * len(questions) * settings.samples for role in roles
                  if role.name not in ("default", *held_out))[-2:]
    if most and min_count > most[0]:
        raise ValueError(f"min_count is {min_count}, but two roles with so many rollouts are "
                         f"needed, and these questions and samples make at most {most[0]}; lower "
                         "min_count or ask more")
    if len(roles) - 1 - len(held_out) < 2:
        raise ValueError(f"{len(roles) - 1 - len(held_out)} roles besides the default may enter "
                         "the axis; it needs two")
    if judge.name == "self" and (bare := [
            r.name for r in roles if r.name != "default" and not r.eval_prompt]):
        raise ValueError(f"the judge 'self' needs an eval_prompt; {', '.join(bare[:5])} have none")
    if model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer; roles need one")
    prompts = [prompt for role in roles for prompt in role.prompts]
    longest = max(prompts, key=len), max(questions, key=lambda q: len(q.text))
    pairs = [(prompt, longest[1].text) for prompt in prompts]
    pairs += [(longest[0], question.text) for question in questions]
    context = model.config.max_context
    rows = [chat.encode_row(model.tokenizer, opening(*pair)) for pair in pairs]
    for (prompt, question), row in zip(pairs, rows, strict=True):
        size = row.tokens.size
        if size >= context:
            raise ValueError(f"the prompt {prompt[:40]!r} with the question {question[:40]!r} has "
                             f"{size} tokens; the context holds {context}, the reply included")
    return tokens_digest(rows)


def _play_missing(model: Model, run: Run, roles: Sequence[Role], questions: Sequence[Question],
                  settings: Settings, report: Report | None) -> int:
    """Play the roles whose conversations are not there yet, several to a call."""
    size = {role.name: len(role.prompts) * len(questions) * settings.samples for role in roles}
    owned = {role.name: processes.owns(i) for i, role in enumerate(roles)}
    held = _whole(run, [role.name for role in roles if owned[role.name]])
    missing = [role for role in roles if not held[role.name]]
    total = sum(size.values())
    done = total - sum(size[role.name] for role in missing)
    tokens = 0
    if report is not None:
        report("rollouts", done, total, tokens)
    while missing:
        group: list[Role] = []
        while missing and (not group or sum(size[r.name] for r in group) < _TOGETHER):
            group.append(missing.pop(0))
        before, latest = (done, tokens), [0]

        def tell(rows: int, _: int, made: int, before=before, latest=latest) -> None:
            latest[0] = made
            if report is not None:
                report("rollouts", before[0] + rows, total, before[1] + made)

        found = play(model, group, questions, settings, progress=tell)
        for role in group:
            if owned[role.name]:
                run.save_rollouts(role.name, *found[role.name])
            done += size[role.name]
        tokens += latest[0]
    return tokens


def _whole(run: Run, mine: Sequence[str]) -> dict[str, bool]:
    """Return for every role whether its rollouts are there, after a check of all its files.

    Args:
      mine: the roles whose files this process keeps.

    Raises:
      ValueError: damaged files, of whichever process's roles; each is named.
    """
    found: dict[str, bool | str] = {}
    for name in mine:
        try:
            found[name] = run.is_whole(name)
        except Damaged as error:
            found[name] = error.fault
    found = processes.merge(found)
    faults = {name: fault for name, fault in found.items() if isinstance(fault, str)}
    if faults:
        raise ValueError(f"{'; '.join(faults.values())}; {remedy(sorted(faults))}")
    return {name: bool(whole) for name, whole in found.items()}


def _in_order(mine: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Join every process's roles, in the order of the roles, so that sums run in that order."""
    found = processes.merge(mine)
    return {name: found[name] for name in names}


def _judge(run: Run, role: Role, judge: Judge, mine: bool) -> list[int | None]:
    """Return a role's scores in the order of its rollouts; the default's are None.

    The process that keeps the role's files reads them; a judge that asks the model is asked by all
    processes together, any other by that process alone.
    """
    told = {"records": run.rollouts(role.name) or [], "kept": run.scores(role.name)} if mine else {}
    told = processes.merge(told)
    records: Any = told["records"]
    kept: Any = told["kept"]
    if role.name == "default":
        return [None] * len(records)
    if kept is None:
        scores = judge(role, records) \
            if mine or getattr(judge, "together", False) else None
        given: Any = processes.merge({"scores": scores} if mine else {})["scores"]
        if len(given) != len(records):
            raise ValueError(f"the judge {judge.name!r} gave {len(given)} scores for the "
                             f"{len(records)} rollouts of role {role.name!r}; it must give one "
                             "each")
        kept = {rollout_key(r): score for r, score in zip(records, given, strict=True)}
        if mine:
            run.save_scores(role.name, kept)
    return [kept[rollout_key(record)] for record in records]


def _count(scores: Sequence[int | None]) -> dict[str, int]:
    return {str(s): sum(x == s for x in scores) for s in (0, 1, 2, 3, None)}


def _save_analysis(run: Run, analysis: science.Analysis, projections: dict[str, np.ndarray],
                   counts: dict[str, dict[str, int]], held_out: Sequence[str]) -> None:
    """Keep the figures of the run: `analysis.json`."""
    write_json(run.folder / "analysis.json", {
        "layers": len(analysis.axis),
        "cos_pc1_axis": [round(float(c), 6) for c in analysis.cos_pc1],
        "variance_ratio": [[round(float(r), 6) for r in c.ratio[:20]]
                           for c in analysis.components],
        "roles": {
            name: {"mean_projection": [round(float(x), 6) for x in np.nanmean(value, 0)],
                   "rollouts": len(value), "held_out": name in held_out,
                   "in_axis": name in analysis.names, "scores": counts.get(name)}
            for name, value in projections.items()
        },
    })
