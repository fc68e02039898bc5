"""Export a run folder to the output folder of the published Assistant Axis code.

The module `runs.published` describes the files. Texts, scores, vectors and the axis of a run are
exported without loss. A run folder stores the response means of a sample of the rollouts, as
bfloat16 differences from their average (`runs.sums.Sample`). If the response means of all replies
of a role with the same score are stored, the export shifts them by a constant, so that their
average equals the exact sum divided by the number of replies. Steps 4 and 5 of the published code
then reproduce the run's vectors and axis, unless the run corrects them for questions that roles
were not asked (`persona.unequal`): the published code has no such correction. The exported vectors
and axis are the corrected ones, and `jaxpersona.json` contains the slope of the correction, so that
an import corrects them again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpersona.brief import brief, count, named
from jaxpersona.ckpts.files import new_folder, write_json, write_text
from jaxpersona.ckpts.torchmeans import write_pickle
from jaxpersona.data.texts import DEFAULT
from jaxpersona.errors import UserError
from jaxpersona.extras import require
from jaxpersona.persona import axis as science
from jaxpersona.persona.precision import Cells
from jaxpersona.persona.unequal import (
    Correction,
    cells_of,
    corrected,
    correction,
    merged_cells,
    order_of,
    questions_of,
)
from jaxpersona.progress import shows, steps
from jaxpersona.runs import published
from jaxpersona.runs.compare import LAST
from jaxpersona.runs.imported import IMPORTED
from jaxpersona.runs.live import Live
from jaxpersona.runs.rollouts import rollout_key
from jaxpersona.runs.run import Run
from jaxpersona.runs.sums import EMPTY, Sums

CHOICES = ("all", "sample", "none")  # values of the argument `activations`
ORIGIN = "jaxpersona.json"  # model, judge and settings of the run; read only by this package
FORMAT = "jaxpersona-export 1"
Report = Callable[[str, int, int, int], None]


@dataclasses.dataclass(frozen=True)
class Exported:
    """The result of `export_reference`.

    Attributes:
      folder: the written folder.
      rollouts, scores, means: the numbers of exported rollouts, scores and response means.
      roles: the roles whose vectors define the exported axis; [] if there is no axis.
      notes: notes on omitted data and on the use of the folder with the published code.
    """

    __repr__ = brief

    folder: pathlib.Path
    rollouts: int
    scores: int
    means: int
    roles: list[str]
    notes: list[str]


@shows(steps, "report")
def export_reference(run: str | os.PathLike[str], folder: str | os.PathLike[str], *,
                     activations: str = "all", judge: str | None = None,
                     min_count: int | None = None, fold_system: bool = False,
                     incomplete: bool = False, report: Report | bool | None = None) -> Exported:
    """Export a run folder in the format of the published Assistant Axis code.

    The exported folder contains responses, scores, vectors, the axis and, depending on
    `activations`, the response means, so that the published pipeline can continue at any script.
    The vectors and the axis are computed from the run's sums. The folder is written under a
    temporary name and then renamed.

    Args:
      run: the run folder; it is not changed.
      folder: a new or empty folder.
      activations: "all" writes the response means of all rollouts, and raises an error if the run
        does not store all of them (`extract_axis` with `keep_means=None` stores all); "sample"
        writes the stored means to the folder `activations_sample`, which the published code does
        not read; "none" writes none.
      judge: the name of the judge whose scores are exported; default: the judge of the run's last
        `extract_axis` call.
      min_count: the number of rollouts with score 3 that a role needs for a vector; default: the
        `min_count` of the run's last `extract_axis` call.
      fold_system: whether to prepend the system prompt to the user's message, as the published
        code does for models whose chat template has no system role, such as Gemma 2.
      incomplete: whether to omit incomplete roles; if false, an incomplete role is an error.
      report: by default, a call of more than three seconds shows its progress; False shows
        nothing. A function is called instead with ("export", finished roles, all roles, 0).

    Returns:
      The numbers of exported rollouts, scores and response means, the roles, and notes.

    Raises:
      UserError: an argument is invalid, `run` is not a run folder, a file in it is damaged, a role
        is incomplete, response means are missing, the run has several rollouts per prompt and
        question, a role name is not valid in the published format, PyTorch is not installed, or
        `folder` is not empty.

    Examples:
      >>> import tempfile
      >>> from jaxpersona.persona.exporting import export_reference
      >>> try:
      ...     export_reference(tempfile.mkdtemp(), "out")
      ... except ValueError as error:
      ...     print(str(error).split(": ")[-1])
      no such file
    """
    if activations not in CHOICES:
        raise UserError(f"activations is {activations!r}; it must be one of {', '.join(CHOICES)}")
    if min_count is not None and min_count < 1:
        raise UserError(f"min_count is {min_count}; it must be positive")
    found = Run.read(run)
    judge = found.judge if judge is None else judge
    if judge not in found.manifest["judges"]:
        raise UserError(f"judge is {judge!r}; it must be a judge of the run in {found.folder}: "
                        f"{', '.join(map(repr, found.manifest['judges']))}")
    require("torch", "the published format contains .pt files, which need PyTorch")
    target = pathlib.Path(os.path.abspath(folder))
    with new_folder(target) as temporary:
        return _Export(found, temporary, target, activations, judge, min_count, fold_system,
                       incomplete).write(report if callable(report) else None)


class _Export:
    """The state of one export: the arguments of `export_reference`, and the results so far."""

    def __init__(self, run: Run, temporary: pathlib.Path, target: pathlib.Path, activations: str,
                 judge: str, min_count: int | None, fold_system: bool, incomplete: bool) -> None:
        last = run.manifest.get(LAST, {})
        self.run, self.folder, self.target = run, temporary, target
        self.activations, self.judge, self.fold = activations, judge, fold_system
        self.incomplete, self.held_out = incomplete, set(last.get("held_out", ()))
        self.least = int(last.get("min_count", 1)) if min_count is None else min_count
        about = run.manifest["model"]
        self.shape = (about["layers"], about["width"])
        self.rollouts = self.scores = self.means = 0
        self.vectors: dict[str, np.ndarray] = {}
        self.found: dict[str, dict[str, tuple[np.ndarray, int]]] = {}  # role → `Sums.vectors(…)`
        self.asked: dict[str, Mapping[int, int]] = {}  # role → question id → number of rollouts
        self.corrected: list[str] = []  # roles with a vector that is corrected for the questions
        self.problem = ""  # see `Correction.problem`
        self.omitted: list[str] = []  # roles omitted as incomplete
        self.unsummed: list[str] = []  # roles without sums by the judge's scores
        self.few: list[str] = []  # roles with fewer than `least` rollouts with score 3

    def write(self, report: Report | None) -> Exported:
        names = list(self.run.manifest["roles"])
        for name in names:
            published.check_role(name)
        for i, name in enumerate(names):
            self._role(name)
            if report is not None:
                report("export", i + 1, len(names), 0)
        change = self._correction()
        for name in names:
            if name not in self.omitted:
                self._vector(name, change.shifts.get(name))
        self.corrected, self.problem = sorted(change.shifts), change.problem
        used = self._axis(names)
        last = self.run.manifest.get(LAST, {})
        about = self.run.manifest["model"]
        write_json(self.folder / ORIGIN, {
            "format": FORMAT, "model": last.get("model", ""), "fingerprint": about["fingerprint"],
            "fingerprint_scheme": about["fingerprint_scheme"], "judge": self.judge,
            "min_count": self.least, "held_out": sorted(self.held_out), "roles_in_axis": used,
            "activations": self.activations,
            "question_slope": change.slope if change.shifts else None,
            "arguments": self.run.manifest["arguments"],
            **({IMPORTED: self.run.manifest[IMPORTED]} if IMPORTED in self.run.manifest else {})})
        return Exported(self.target, self.rollouts, self.scores, self.means, used,
                        self._notes(used))

    def _role(self, name: str) -> None:
        """Write the files of one role.

        Raises:
          UserError: the role is incomplete, has several samples per prompt and question, or lacks
            response means that must be exported.
        """
        records = self.run.rollouts(name)
        live = self.run.live(name, self.shape, repair=False)
        known = {} if records is None else {rollout_key(record): record for record in records}
        newer = any(verdict.get("error") is None for of, verdicts in live.verdicts.items()
                    for verdict in verdicts.values() if of.rpartition("/")[0] == self.judge)
        if records is None or set(live.records) - set(known) or newer:
            if not self.incomplete:
                raise UserError(f"{self.run.folder}: role {name!r} is not complete; finish the run "
                                "with `jaxpersona axis`, or omit such roles with incomplete=True "
                                "(--incomplete)")
            self.omitted.append(name)
            return
        if any(record.get("sample") for record in records):
            raise UserError(f"{self.run.folder} has several samples per prompt and question, but "
                            "the published format has one; export a run with samples=1")
        keys = {key: published.published_key(record) for key, record in known.items()}
        write_text(self.folder / published.RESPONSES / f"{name}.jsonl", "".join(
            json.dumps(published.published_record(record, fold_system=self.fold),
                       ensure_ascii=_has_surrogates(record)) + "\n" for record in records))
        self.rollouts += len(records)
        scores = {keys[key]: score for key, score
                  in (self.run.scores(name, self.judge) or {}).items() if score is not None}
        if scores:
            write_text(self.folder / published.SCORES / f"{name}.json",
                       json.dumps(scores, indent=2) + "\n")
            self.scores += len(scores)
        sums = self.run.sums(name, self.judge)
        if sums is not None:
            self.found[name] = sums.vectors(science.LABELS)
            self.asked[name] = questions_of(self.run, name, self.judge, sums)
        if self.activations == "none":
            return
        means, lost = self._means(name, set(known), sums, live)
        if self.activations == "all" and lost:
            raise UserError(f"{self.run.folder}: does not store the response means of {len(lost)} "
                            f"of the {len(known)} rollouts of role {name!r}; export without them "
                            "(activations=\"none\", --activations none) and compute them with "
                            "2_activations.py, export a sample (\"sample\"), or extract the axis "
                            "with keep_means=None (--keep-means all)")
        part = published.ACTIVATIONS if self.activations == "all" else published.SAMPLE
        if means:
            write_pickle(self.folder / part / f"{name}.pt",
                         {keys[key]: mean for key, mean in means.items()})
            self.means += len(means)

    def _means(self, name: str, known: set[str], sums: Sums | None, live: Live,
               ) -> tuple[dict[str, np.ndarray], set[str]]:
        """Return (key → stored response mean [L, D], keys of the rollouts without a stored mean).

        Empty replies, which have no response mean, are in neither result.

        Args:
          name: the name of the role.
          known: the keys of the role's rollouts.
          sums: the sums of the role's response means, or None.
          live: the live files of the role.
        """
        sample, sums = self.run.sample(name), Sums({}, {}) if sums is None else sums
        means = dict(zip(sample.keys, sample.means, strict=True))
        by_group: dict[str, list[str]] = {}
        for key, group in sums.groups.items():
            by_group.setdefault(group, []).append(key)
        empty = set(by_group.pop(EMPTY, ()))
        for group, keys in by_group.items():
            if all(key in means for key in keys):
                held = [means[key] for key in keys]
                shift = sums.totals[group] / len(keys) - np.mean(held, axis=0, dtype=np.float64)
                means.update((key, (mean + shift).astype(np.float32))
                             for key, mean in zip(keys, held, strict=True))
        means.update((key, live.mean(key)) for key in live.records)
        empty |= {key for key, mean in means.items() if np.isnan(mean).all()}
        found = {key: mean for key, mean in means.items() if key in known - empty}
        return found, known - set(found) - empty

    def _correction(self) -> Correction:
        """Return the corrections with which `extract_axis` computes the complete roles' vectors."""
        if DEFAULT not in self.asked:
            return Correction(None, {}, "")
        cells: dict[str, Cells | None] = {}
        if len({frozenset(some) for some in self.asked.values()}) > 1:
            order = order_of(self.asked, self.run.manifest["arguments"]["seed"])
            for name, some in self.asked.items():
                sums = self.run.sums(name, self.judge)
                cells[name] = None if sums is None else cells_of(sums, name, order, some)
        return correction(self.run, self.asked, merged_cells(cells) if cells else None)

    def _vector(self, name: str, shift: np.ndarray | None) -> None:
        """Write a role's vector, unless the role is held out or has too little data."""
        label = "mean" if name == DEFAULT else "pos_3"
        found = corrected(self.found.get(name, {}), shift)
        if not found:
            self.unsummed.append(name)
            return
        if label not in found or (name != DEFAULT and found[label][1] < self.least):
            self.few.append(name)
            return
        if name in self.held_out:
            return
        self.vectors[name] = found[label][0]
        write_pickle(self.folder / published.VECTORS / f"{name}.pt",
                     {"vector": found[label][0], "type": label, "role": name})

    def _axis(self, names: Sequence[str]) -> list[str]:
        """Write the axis if it can be computed; return the names of the roles used, or []."""
        used = sorted(set(self.vectors) - {DEFAULT})
        if DEFAULT not in self.vectors or len(used) < 2 or self.unsummed or self.omitted:
            return []
        default, roles = self.vectors[DEFAULT], np.stack([self.vectors[name] for name in used])
        write_pickle(self.folder / published.AXIS, {
            "axis": science.assistant_axis(default, roles), "default_mean": default,
            "role_mean": roles.mean(0, dtype=np.float64).astype(np.float32),
            "n_default": 1, "n_roles": len(used)})
        return used

    def _notes(self, used: Sequence[str]) -> list[str]:
        """Return notes on omitted data and on the use of the folder with the published code."""
        found = []
        for names, why in ((self.omitted, "incomplete, therefore omitted"),
                           (self.unsummed, f"no sums by the scores of the judge {self.judge!r}, "
                                           "therefore no vector; run `jaxpersona axis` with this "
                                           "judge"),
                           (self.few, f"fewer than {count(self.least, 'rollout')} with score 3, "
                                      "therefore no vector"),
                           (sorted(self.held_out - set(self.omitted)),
                            "held out, therefore no vector; 4_vectors.py ignores this, so "
                            "move the role's files away before you run it")):
            if names:
                found.append(f"{named(names, 'role')}: {why}")
        if not used:
            found.append(f"{published.AXIS} was not written; the axis needs the sums of all roles "
                         "and at least two roles with a vector")
        if self.corrected:
            found.append(f"{named(self.corrected, 'role')}: asked other questions than the default "
                         "persona; the exported vectors and the axis are corrected for this, and "
                         "4_vectors.py and 5_axis.py, which have no such correction, compute others"
                         )
        if self.problem:
            found.append(self.problem)
        if self.activations == "none":
            found.append("the response means were not exported; 2_activations.py computes them "
                         "again")
        if self.activations == "sample":
            found.append(f"{published.SAMPLE} contains only the response means that the run "
                         "stores; vectors and axis are averages over all rollouts")
        if self.activations == "all":
            found.append("the run stores each response mean as its difference from the role's "
                         "average, with eight significant bits; the averages by score are exact")
        if self.judge == "none":
            found.append("the judge 'none' gave score 3 to every reply without reading it; delete "
                         f"{published.SCORES} to judge the replies with 3_judge.py")
        found.append(f"4_vectors.py needs --min_count {self.least} to use the same roles")
        return found


def _has_surrogates(record: Mapping[str, Any]) -> bool:
    """Return whether a rollout has a lone surrogate, which UTF-8 cannot encode."""
    texts = [record["system_prompt"], record["question"],
             *(message["content"] for message in record["conversation"])]
    return any(0xD800 <= ord(character) <= 0xDFFF for text in texts for character in text)
