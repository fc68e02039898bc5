"""Read the data for the page of a run (`run_page`) from the run folder.

Files are read and verified one role at a time, and only the data for the page is kept, so that the
texts of all roles are never in memory together.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.ckpts.vectors import load_axis
from jaxpersona.data.texts import DEFAULT, Role
from jaxpersona.errors import UserError
from jaxpersona.inputs import read_json
from jaxpersona.judges.protocol import Item
from jaxpersona.persona import verdicts
from jaxpersona.persona.bootstrap import averaged_rows
from jaxpersona.persona.verdicts import verdict_counts
from jaxpersona.report.run_halves import Halves
from jaxpersona.report.run_rounds import Curve
from jaxpersona.runs.compare import roles_of
from jaxpersona.runs.files import MANIFEST, STATUS
from jaxpersona.runs.run import Run
from jaxpersona.runs.status import read_status
from jaxpersona.vectors.vector import Axis

Progress = Callable[[str, int, int, int], None]
SAMPLES = 3  # maximum number of dialogues that the page shows for each score


@dataclasses.dataclass(frozen=True)
class Measured:
    """The values of a role in `analysis.json`.

    Attributes:
      mean: [L], the mean projection of the role's replies onto the axis; NaN if all replies are
        empty.
      quartiles: [2, L], 25th and 75th percentiles of the projections of the stored response means.
      rollouts: the number of the role's rollouts.
      stored: the number of the role's rollouts whose response means are stored.
      in_axis: whether the role's vector is included in the axis.
      held_out: whether the role was held out of the axis (`--held-out`).
    """

    __repr__ = brief

    mean: np.ndarray
    quartiles: np.ndarray
    rollouts: int
    stored: int
    in_axis: bool
    held_out: bool


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The content of `analysis.json`.

    Attributes:
      cos: [L], |cos(PC1, axis)| at each layer.
      variance: for each layer, the explained variance ratios of the first components.
      intervals: population → name of a percentile → [2, L], the ends of the percentile's 95 %
        bootstrap interval. The population is "default" (the default persona) or "all" (also the
        roles that are not held out); a name is, for example, "p25".
      roles: name of a role or "default" → its `Measured`.
      rounds: the rounds of a run with `--precision`, or None.
    """

    __repr__ = brief

    cos: np.ndarray
    variance: list[np.ndarray]
    intervals: dict[str, dict[str, np.ndarray]]
    roles: dict[str, Measured]
    rounds: Curve | None = None


@dataclasses.dataclass
class Contents:
    """The content of a run folder that the page of the run shows.

    Attributes:
      folder: the run folder.
      manifest: the content of run.json.
      judge: the judge of the axis; without an axis, the judge of the last call.
      status: the content of status.json; None if the file is missing.
      axis, analysis: the results of the run; None if it has not computed them yet.
      roles: the names of the roles, sorted, without the default persona.
      closed: names of the roles (and "default") whose replies have all been generated and judged.
      counts: role → score as text, "None" or "failed" → number of replies; closed roles only.
      rollouts: closed role or "default" → number of rollouts.
      replies: closed role or "default" → (reply, score), a reply with the role's highest score.
      samples: (reply, score) pairs in descending order of score; undecided replies come last.
      plain: replies of the default persona, which is not judged.
      vectors: closed role → its vector [L, D] for rollouts with score 3, and "default" → mean
        [L, D] of the default persona's response means, as stored by the run; empty without an axis.
      stored: role of the axis or "default" → the keys of its stored response means that its vector
        averages; empty without an axis.
      averaged: role of the axis or "default" → number of replies that its vector averages.
      halves: the halves of the stored response means, from which the split-half agreement of the
        axis is computed; None without an axis.
    """

    __repr__ = brief

    folder: pathlib.Path
    manifest: dict[str, Any]
    judge: str
    status: dict[str, Any] | None
    axis: Axis | None
    analysis: Analysis | None
    roles: list[str]
    closed: set[str] = dataclasses.field(default_factory=set)
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    rollouts: dict[str, int] = dataclasses.field(default_factory=dict)
    replies: dict[str, tuple[Item, int | None]] = dataclasses.field(default_factory=dict)
    samples: list[tuple[Item, int | None]] = dataclasses.field(default_factory=list)
    plain: list[Item] = dataclasses.field(default_factory=list)
    vectors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    stored: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    averaged: dict[str, int] = dataclasses.field(default_factory=dict)
    halves: Halves | None = None


def check_run(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Return the path of a folder that contains a run.

    Raises:
      UserError: the folder contains no run.
    """
    path = pathlib.Path(folder)
    if not (path / MANIFEST).exists():
        raise UserError(f"{path}: contains no run; give the folder that `jaxpersona axis` wrote "
                        "with --out")
    return path


def read(folder: str | os.PathLike[str], *, report: Progress | None = None,
         seed: int = 0) -> Contents:
    """Read a run folder, even while the run is in progress.

    Args:
      folder: the run folder; it is not changed.
      report: a progress function, called with ("roles", done, total, 0).
      seed: the random seed for choosing the replies that the page shows.

    Raises:
      UserError: the folder contains no run, or a file is damaged.
    """
    path = check_run(folder)
    run = Run.read(path)
    names = sorted(name for name in roles_of(path, run.manifest) if name != DEFAULT)
    axis, analysis = _results(path, run.manifest)
    found = Contents(
        path, run.manifest, run.judge if axis is None else str(axis.notes.get("judge", run.judge)),
        read_status(path) if (path / STATUS).exists() else None, axis, analysis, names)
    if axis is not None and analysis is not None:
        found.halves = Halves(axis.values.shape)
    chosen: dict[str, Item] = {}
    scores: dict[str, int | None] = {}
    every = [DEFAULT, *names]
    for place, name in enumerate(every):
        if report is not None:
            report("roles", place, len(every), 0)
        if not run.path("sums", name, found.judge).exists():  # the role is not complete
            continue
        own = _read_role(run, name, found)
        items = verdicts.items_of(Role(name, (), ""), run.rollouts(name) or [])
        found.rollouts[name] = len(items)
        picked = _pick(items, None if name == DEFAULT else own, [seed, place])
        if name == DEFAULT:
            found.plain = [item for item, _ in picked]
        for item, score in picked if name != DEFAULT else ():
            chosen[f"{name}/{item.key}"], scores[f"{name}/{item.key}"] = item, score
        if picked:
            found.replies[name] = max(picked, key=lambda one: -1 if one[1] is None else one[1])
    if report is not None:
        report("roles", len(every), len(every), 0)
    found.samples = verdicts.sample(chosen, scores, SAMPLES, seed=seed)
    return found


def _read_role(run: Run, name: str, found: Contents) -> dict[str, int | None]:
    """Add a closed role to `found`; return a dict from key to score.

    The dict omits rollouts on which the judge failed; it is empty for the default persona.
    """
    given = run.verdicts(name, found.judge)
    scores: dict[str, int | None] = {}
    if given is not None:
        found.counts[name] = verdict_counts(given)
        scores = {key: score for key, score in given["scores"].items()
                  if "error" not in given["details"].get(key, {})}
    found.closed.add(name)
    measured = None if found.analysis is None else found.analysis.roles.get(name)
    if measured is not None and found.halves is not None:
        label = "mean" if name == DEFAULT else "pos_3"
        if (vector := run.vectors(name).get(label)) is not None:
            found.vectors[name] = vector
        if measured.in_axis or name == DEFAULT:
            sample, used = run.sample(name), None if name == DEFAULT else scores
            found.halves.add(name, sample, used)
            found.stored[name] = [sample.keys[i] for i in averaged_rows(sample, used)]
            # without empty replies, which have no response mean
            sums = None if used is None else run.sums(name, found.judge)
            found.averaged[name] = len(found.stored[name]) if sums is None else sums.count("3")
    return scores


def _pick(items: Sequence[Item], scores: Mapping[str, int | None] | None, seed: list[int],
          ) -> list[tuple[Item, int | None]]:
    """Return up to `SAMPLES` random replies with each score, or in total if `scores` is None."""
    by_score: dict[int | None, list[Item]] = {}
    for item in items:
        if scores is None or item.key in scores:
            by_score.setdefault((scores or {}).get(item.key), []).append(item)
    rng = np.random.default_rng(seed)
    return [(some[i], score) for score, some in by_score.items()
            for i in rng.permutation(len(some))[:SAMPLES]]


def _results(folder: pathlib.Path, manifest: Mapping[str, Any],
             ) -> tuple[Axis | None, Analysis | None]:
    """Read the axis and the analysis, or return (None, None) if one of them is missing.

    Raises:
      UserError: a file is damaged, or does not belong to the run.
    """
    files = folder / "axis.safetensors", folder / "analysis.json"
    if not all(file.exists() for file in files):
        return None, None
    axis, about = load_axis(files[0]), read_json(files[1])
    model = manifest.get("model", {})
    if axis.fingerprint != model.get("fingerprint"):
        raise UserError(f"{files[0]} is the axis of another model, not of the run's model; run "
                        "`jaxpersona axis` again to rewrite it")
    try:
        return axis, _analysis(about, axis.n_layers)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError,
            ValueError) as error:
        raise UserError(f"{files[1]} is damaged ({type(error).__name__}: {error}); run "
                        "`jaxpersona axis` again to rewrite it") from None


def _analysis(about: Any, layers: int) -> Analysis:
    """Convert the content of `analysis.json` to an `Analysis`.

    Args:
      about: the parsed JSON.
      layers: the number of layers of the axis.

    Raises:
      AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError: a field is missing
        or has a wrong type or shape.
    """
    roles = {}
    for name, entry in about["roles"].items():
        mean = np.array(entry["mean_projection"], np.float64).reshape(layers)
        quartiles = np.array(entry["quartiles"], np.float64).reshape(2, layers)
        roles[str(name)] = Measured(mean, quartiles, int(entry["rollouts"]),
                                    int(entry["kept_means"]), bool(entry["in_axis"]),
                                    bool(entry["held_out"]))
    intervals = {
        str(of): {str(name): np.array([value["low"], value["high"]], np.float64).reshape(2, layers)
                  for name, value in table.items()}
        for of, table in about["thresholds"].items()}
    variance = [np.array(row, np.float64) for row in about["variance_ratio"]]
    if len(variance) != layers or DEFAULT not in roles:
        raise ValueError(f"it has {len(variance)} layers and {len(roles)} roles; it must have "
                         "all layers of the axis and the role 'default'")
    if any(row.ndim != 1 for row in variance):
        raise ValueError("variance_ratio must have a list of numbers for each layer")
    return Analysis(np.array(about["cos_pc1_axis"], np.float64).reshape(layers), variance,
                    intervals, roles,
                    Curve.read(about["precision"]) if "precision" in about else None)
