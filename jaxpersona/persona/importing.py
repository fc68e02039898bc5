"""Import the output folder of the published Assistant Axis code as a run folder.

The module `runs.published` describes the files. The texts and scores are copied, the response means
are added to sums by score, and a sample of the means is stored, as in any run of this package. With
the same `min_count`, the axis of the imported run therefore equals the result of the published
steps 4 and 5, computed in float64. The vectors of a run that `export_reference` exported with
corrections for unequal questions (`persona.unequal`) are corrected again.

All texts and scores are checked first, and the response means while they are imported. The run
folder is written under a temporary name and moved to its final place at the end, so a failed or
interrupted import leaves no run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import types
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from jaxpersona.brief import brief, count, named
from jaxpersona.data.texts import DEFAULT, Role, all_of
from jaxpersona.errors import UserError
from jaxpersona.extras import require
from jaxpersona.models.model import check_model
from jaxpersona.persona.collect import rubric_of
from jaxpersona.persona.extract import axis_of
from jaxpersona.persona.extraction import Extraction
from jaxpersona.persona.source import Report, Source
from jaxpersona.progress import shows, steps
from jaxpersona.runs import published
from jaxpersona.runs.compare import judges_of, manifest_of, roles_of
from jaxpersona.runs.files import MANIFEST, delete, delete_run
from jaxpersona.runs.lock import locked
from jaxpersona.runs.rollouts import Settings, place_of
from jaxpersona.runs.run import Run
from jaxpersona.runs.sample import KEEP, check_keep, chosen
from jaxpersona.runs.status import Status
from jaxpersona.runs.sums import EMPTY, Sums, sampled

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

MIN_COUNT = 50  # default of `min_count`, as in the published script 4_vectors.py
_UNJUDGED = {"error": "the imported folder has no score for this rollout"}
# passed to `axis_of` in place of an unknown model
_UNKNOWN = types.SimpleNamespace(name="", fingerprint="", params=types.SimpleNamespace(layers=()))


@dataclasses.dataclass(frozen=True)
class Imported:
    """The result of `import_reference`.

    Attributes:
      run: the run folder.
      rollouts, scores, means: role → number of imported rollouts, scores and response means.
      extraction: the axis and its statistics; None if there are too few response means or scores
        for an axis.
      notes: notes on data that was not imported and on limits of the imported run.
    """

    __repr__ = brief

    run: pathlib.Path
    rollouts: dict[str, int]
    scores: dict[str, int]
    means: dict[str, int]
    extraction: Extraction | None
    notes: list[str]


@shows(steps, "report")
def import_reference(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    model: Model | None = None,
    roles: Sequence[Role] | None = None,
    judge: str = "imported",
    settings: Settings | None = None,
    min_count: int = MIN_COUNT,
    held_out: Sequence[str] = (),
    keep_means: int | None = KEEP,
    overwrite: bool = False,
    report: Report | bool | None = None,
) -> Imported:
    """Convert the output folder of the published Assistant Axis code to a run folder.

    The folder must contain `responses`; `scores` and `activations` may be missing, as a whole or
    for some roles. Tensor files are read without executing code in them.

    Args:
      source: the folder with `responses`, `scores` and `activations`; it is not changed.
      run: the run folder; it must be new or empty, unless `overwrite` is true.
      model: the model that generated the responses. Up to four response means are recomputed with
        the model and compared, and `extract_axis` can then continue the run with this model. None:
        the model is unknown, and `extract_axis` raises an error for the run.
      roles: the roles; their prompts must equal those in the responses. None: the prompts are
        read from the responses. The scores are stored for the `eval_prompt` of these roles (None:
        for ""); if `extract_axis` is called with another `eval_prompt`, it discards the scores.
      judge: the name under which the scores are stored.
      settings: the generation settings with which `extract_axis` continues the run; `samples` must
        be 1. Default: `Settings()`, which has the published values.
      min_count: the number of rollouts with score 3 that a role needs to be included in the axis.
      held_out: names of roles that are included neither in the axis nor in the thresholds.
      keep_means: the number of rollouts per role whose response means are stored; None: all. All
        response means of the default persona are stored.
      overwrite: whether to replace a run in the folder. The old run is deleted only after the whole
        source has been read without errors.
      report: by default, a call of more than three seconds shows its progress; False shows
        nothing. A function is called instead with (step, done, total, tokens), where `tokens` is
        always 0; the steps are "checking", "comparing" (stored response means with recomputed
        ones) and "import".

    Returns:
      The numbers of imported rollouts, scores and response means, the axis, and notes on data that
      was not imported and on limits of the imported run.

    Raises:
      UserError: `source` contains invalid data (the message lists all errors, with line numbers);
        `model` did not generate the responses; neither `model` nor the folder determines the shape
        of response means; an argument is invalid, such as an unknown name in `held_out`; a package
        is missing; or `run` is a file, cannot be written, contains a run although `overwrite` is
        false, or contains files but no run.

    Examples:
      >>> import tempfile
      >>> from jaxpersona.persona.importing import import_reference
      >>> try:
      ...     import_reference(tempfile.mkdtemp(), "run")
      ... except ValueError as error:
      ...     print(str(error).split("; ")[-1])
      give the output folder of the published code
    """
    settings = settings or Settings()
    if settings.samples != 1:
        raise UserError(f"settings.samples is {settings.samples}; the published format has one "
                        "sample per prompt and question: use samples=1")
    if model is not None:
        check_model(model)
        if model.tokenizer is None:
            raise UserError(f"{model.name} has no tokenizer; the comparison of "
                            "response means needs one")
    if not isinstance(judge, str) or not judge:
        raise UserError(f"judge is {judge!r:.60}; give a name for the scores")
    if min_count < 1:
        raise UserError(f"min_count is {min_count}; it must be positive")
    check_keep(keep_means)
    require("sklearn", "the axis's principal components need scikit-learn")
    target = pathlib.Path(os.path.abspath(run))
    _check_target(target, overwrite)
    given = None if roles is None else {role.name: role for role in all_of(Role, roles, "roles")}
    tell = report if callable(report) else None
    found = Source(pathlib.Path(source), given, model, tell)
    if unknown := sorted(set(held_out) - set(found.roles) | {DEFAULT} & set(held_out)):
        raise UserError(f"held_out contains {unknown}; give names of the roles in {source}, except "
                        "the default persona")
    about = found.manifest(judge, settings, min_count=min_count, held_out=sorted(held_out),
                           keep_means=keep_means)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with Run.open(temporary, about) as opened:
            result = _write(opened, found, judge, min_count, sorted(held_out), keep_means,
                            settings.seed, tell)
        _move(temporary, target, overwrite)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return dataclasses.replace(result, run=target)


def _write(run: Run, source: Source, judge: str, min_count: int, held_out: Sequence[str],
           keep: int | None, seed: int, report: Report | None) -> Imported:
    """Write all files of the imported run except the manifest, and return the result.

    Raises:
      UserError: response means are not valid; the message lists all errors.
    """
    scored: dict[str, int] = {}
    held: dict[str, int] = {}
    summed: dict[str, Sums] = {}
    closed, notes = 0, []
    slope = source.origin().get("question_slope")
    layer = None if slope is None else source.shape[0] // 2  # the layer of the sums per question
    for i, (name, role) in enumerate(source.roles.items()):
        texts = source.texts(name)
        scores = source.scores(name, texts)
        means = source.means(name, texts, source.shape)
        held[name], scored[name] = len(means), len(scores)
        if not source.faults:
            sums = _store(run, role, texts, scores, means, source.shape, judge, keep, seed,
                          layer)
            closed += len(sums.groups) == len(texts.records)
            if any(group != EMPTY for group in sums.groups.values()):
                summed[name] = sums
        if report is not None:
            report("import", i + 1, len(source.roles), 0)
    source.faults.raise_if_any(source.folder)
    total = sum(source.rollouts.values())
    status = Status(run.folder, total=total, to_judge=total - source.rollouts.get(DEFAULT, 0),
                    roles=len(source.roles))
    status.done, status.judged, status.closed = total, sum(scored.values()), closed
    status.write("complete" if closed == len(source.roles) else "stopped")
    used = [name for name, sums in summed.items()
            if name not in (DEFAULT, *held_out) and sums.count("3") >= min_count]
    found = None
    if DEFAULT in summed and len(used) >= 2:
        found = axis_of(cast("Model", source.model or _UNKNOWN), run,
                        [source.roles[name] for name in summed],
                        cast(Any, types.SimpleNamespace(name=judge)), min_count, held_out, 0,
                        warn=notes.append)
    return Imported(run.folder, dict(source.rollouts), scored, held, found,
                    [*_notes(source, scored, held, summed, used, found, min_count), *notes])


def _store(run: Run, role: Role, texts: published.Texts, scores: Mapping[str, int],
           means: Mapping[str, np.ndarray], shape: tuple[int, int], judge: str, keep: int | None,
           seed: int, layer: int | None) -> Sums:
    """Write the rollouts, sample, scores and sums of a role, and return the sums.

    The sums contain only rollouts with both a score and a response mean; the default persona needs
    no scores. Rollouts that have a response mean but no score are also written to the live files,
    where `runs.closing` expects them until they are judged. `extract_axis` recomputes missing
    response means from the replies. `layer` is the layer of the sums per question; None: no such
    sums are kept.
    """
    name, default = role.name, role.name == DEFAULT
    records = dict(sorted(texts.records.items(), key=lambda item: place_of(item[1])))
    text = "".join(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n"
                   for record in records.values())
    known = dict(means)
    for key, record in records.items() if known else ():  # an empty reply has no response mean
        if key not in known and not record["conversation"][-1]["content"]:
            known[key] = np.full(shape, np.nan, np.float32)
    wanted = chosen({key: record["prompt_index"] for key, record in records.items()
                     if key in known}, None if default else keep, seed=seed, role=name)
    run.save_sample(name, sampled(wanted, None, known.get, shape), text)
    run.save_rollouts(name, text)
    if scores:
        run.save_verdicts(name, judge, rubric_of(role), {key: scores.get(key) for key in records},
                          {key: _UNJUDGED for key in records if key not in scores})
    sums = Sums({}, {}, layer)
    for key in records:
        if key in known and (default or key in scores):
            sums.add(key, scores.get(key), known[key])
    if sums.groups:
        run.save_sums(name, judge, sums)
    live = run.live(name, shape)
    for key, record in records.items():
        if key in known and key not in sums.groups:
            live.add(record, known[key])
    return sums


def _notes(source: Source, scored: Mapping[str, int], held: Mapping[str, int],
           summed: Mapping[str, Sums], used: Sequence[str], found: Extraction | None,
           min_count: int) -> list[str]:
    """Return notes on data that was not imported and on limits of the imported run."""
    roles = [name for name in source.roles if name != DEFAULT]
    empty = {name: sum(group == EMPTY for group in sums.groups.values())
             for name, sums in summed.items()}
    notes = []
    for names, why in (
            ([n for n in source.roles if not held[n]], "no response means; not used by the axis"),
            ([n for n in source.roles if 0 < held[n] + empty.get(n, 0) < source.rollouts[n]],
             "rollouts without a response mean, which the sums omit"),
            ([n for n in roles if scored[n] < source.rollouts[n]],
             "rollouts without a score, which the sums omit"),
            (source.gaps, "missing prompt indices, so `jaxpersona axis` cannot continue the run; "
                          "import it with the roles (--roles)"),
            ([n for n in (DEFAULT,) if n in source.held[published.SCORES]],
             "not judged by this package; its scores were not imported")):
        if names:
            notes.append(f"{named(names, 'role')}: {why}")
    if source.extra:
        notes.append("fields that were not imported: " + ", ".join(
            f"{name:.40} ({count(n, 'rollout')})" for name, n in sorted(source.extra.items())))
    if source.model is None:
        name = source.origin().get("model")
        notes.append("the model is unknown, so `jaxpersona axis` cannot continue the run; to "
                     "continue it, import it with the model (--model"
                     f"{f'; the exported run had the model {name!r:.80}' if name else ''})")
    elif source.distance is not None:
        notes.append("median relative distance of imported response means from response means "
                     f"recomputed with {source.model.name}: {source.distance:.2g}")
    elif source.model is not None:
        notes.append(f"no response mean was recomputed with {source.model.name} and compared, "
                     "because no stored response mean belongs to a reply with valid text")
    if found is None:
        notes.append(f"no axis was computed: roles with at least {count(min_count, 'rollout')} "
                     f"with score 3 that have a response mean: {len(used)}; the axis needs at "
                     "least two such roles and the default persona's response means")
    elif source.axis is not None and source.axis.values.shape == found.axis.values.shape:
        far = np.linalg.norm(found.axis.values - source.axis.values) / np.linalg.norm(
            source.axis.values)
        notes.append(f"relative distance of the axis from that in {published.AXIS}: {far:.1e}")
    return notes


def _check_target(folder: pathlib.Path, overwrite: bool) -> None:
    """Check that a run can be imported into a folder.

    Raises:
      UserError: the path is a file; or the folder contains other files, or a run and `overwrite`
        is false.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder")
    Run(folder, {}).check_new()
    if (folder / MANIFEST).exists() and not overwrite:
        raise UserError(f"{folder}: contains a run; choose another folder, or delete that run with "
                        "overwrite=True (--overwrite)")


def _move(source: pathlib.Path, target: pathlib.Path, overwrite: bool) -> None:
    """Move all files of a run folder to another folder, with run.json last.

    An existing run in the target folder is deleted first. If the process is killed during the move,
    the target has no run.json, so no command treats it as a run.
    """
    target.mkdir(parents=True, exist_ok=True)
    with locked(target):
        _check_target(target, overwrite)
        if (target / MANIFEST).exists():
            old = manifest_of(target, overwrite=True)
            delete_run(target, roles_of(target, old), judges_of(target, old))
            delete(target / MANIFEST)
        files = [path for path in source.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == MANIFEST):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
