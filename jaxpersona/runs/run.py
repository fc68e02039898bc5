"""The run folder: its files, their digests, and the checks before a run is resumed.

    run.json                           the manifest (`runs.manifest`)
    live/<role>.*                      data collected until the role is closed (`runs.live`)
    rollouts/<role>.jsonl              one rollout per line, in the order of `runs.rollouts`
    samples/<role>.safetensors         the response means of a sample of rollouts (`sums.Sample`)
    scores/<judge>/<role>.json         the verdicts of a judge
    sums/<judge>/<role>.safetensors    sums of the response means, grouped by score (`sums.Sums`)
    vectors/<role>.safetensors         averages of the response means, by the last judge's scores
    axis.safetensors                   the axis with its thresholds
    analysis.json                      cosines, variance ratios and projections
    status.json                        progress, rate and time left (`runs.status`)
    .lock                              exists while a process writes to the folder

While rollouts of a role are generated and judged, they are appended to its live files. When all are
judged, the role is closed: `runs.closing` writes its final files (rollouts, samples, scores and
sums) and clears its live files. All files except live files are written under a temporary name and
then renamed, and only status.json contains timestamps. A run that was killed at any point can
therefore be resumed; all its files except status.json are then identical to the files of an
uninterrupted run.

Sealed files (`runs.seal`) contain a digest of their content, the name of their role, and the role's
binding: the digest of the data that determine the role's rollouts. Sample files also contain the
digest of the rollouts file. A call with another judge or `min_count`, with other held-out roles, or
with additional questions or roles extends the run and reuses its files. Each call that starts,
resumes or extends a run recomputes the vectors, the axis and the analysis.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxpersona.ckpts.files import atomic, json_text, leftovers, write_json
from jaxpersona.data.texts import DEFAULT
from jaxpersona.errors import UserError
from jaxpersona.inputs import require_file
from jaxpersona.runs import live
from jaxpersona.runs.compare import (
    BOUND,
    DIGEST,
    FORMAT,
    GROWING,
    LAST,
    check_same,
    judges_of,
    manifest_of,
    roles_of,
    sealed,
    shown,
)
from jaxpersona.runs.damage import Damaged
from jaxpersona.runs.files import (
    MANIFEST,
    PARTS,
    STATUS,
    check_links,
    delete,
    delete_role,
    delete_run,
    folders_of,
    path_of,
    remove_leftovers,
)
from jaxpersona.runs.imported import IMPORTED, continued
from jaxpersona.runs.lock import is_lock, locked
from jaxpersona.runs.rollouts import place_of_key
from jaxpersona.runs.seal import (
    digest,
    read_sealed,
    read_sealed_json,
    sha256,
    write_sealed,
    write_sealed_json,
)
from jaxpersona.runs.sums import Sample, Sums


class Run:
    """The files of one run. `Run.open` starts or resumes the run; `Run.read` opens it read-only.

    If a method's argument `judge` is None, `self.judge` is used.

    Attributes:
      folder: the run folder.
      manifest: the content of run.json, without its digest.
      notices: text lines for the user: changes by this call, and the origin of an imported run.
    """

    def __init__(self, folder: str | os.PathLike, manifest: Mapping[str, Any]) -> None:
        """Create a handle without reading or writing files."""
        self.folder = pathlib.Path(folder)
        self.manifest = json.loads(json.dumps({"format": FORMAT, **manifest}))
        self.manifest.pop(DIGEST, None)
        self.notices: list[str] = []
        self._known: dict[str, tuple[str, str]] = {}  # role → cached result of `_digests`

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Run:
        """Open the run in a folder read-only.

        Raises:
          UserError: the folder contains no run of this format, its manifest is damaged, or one of
            its folders is a symbolic link.
        """
        folder = pathlib.Path(folder)
        found = manifest_of(folder)
        check_links(folder)
        return cls(folder, found)

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: str | os.PathLike, manifest: Mapping[str, Any], worker: int = 0, *,
             overwrite: bool = False) -> Iterator[Run]:
        """Start, resume or extend a run; yield it, with the folder locked against other runs.

        Args:
          folder: a new or empty folder, or the folder of the same run (`compare.check_same`).
          manifest: the manifest of this call, as returned by `runs.manifest.manifest`.
          worker: the index of this process in the run; process 0 must open the folder first.
          overwrite: whether process 0 deletes an existing run in the folder, even a different run,
            and starts a new run. Files that no run wrote are not deleted.

        Raises:
          UserError: the folder belongs to another run (the message lists the differing fields),
            has a manifest that is damaged or of another format, is in use, contains other files or
            symbolic links to folders, or cannot be written.
        """
        run = cls(folder, manifest)
        folder, path = run.folder, run.folder / MANIFEST
        run.check_new()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
        with locked(folder, worker):
            old = run.stored(overwrite and worker == 0)
            if old is not None and overwrite and worker == 0:
                delete_run(folder, roles_of(folder, old), judges_of(folder, old))
                old = None
            if old is not None:
                run._extend(old)
            for place in [folder / live.FOLDER, *dict(
                    (p, None) for _, p in folders_of(folder, run.manifest.get("judges", {})))]:
                try:
                    place.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise UserError(f"{place}: cannot be written "
                                    f"({error.strerror or error})") from None
            if worker == 0:
                remove_leftovers(folder, roles_of(folder, run.manifest),
                                 judges_of(folder, run.manifest))
                stored = sealed(run.manifest)
                if not path.exists() or path.read_bytes() != json_text(stored).encode():
                    write_json(path, stored)
            yield run

    def stored(self, overwrite: bool = False) -> dict[str, Any] | None:
        """Return the manifest of the folder, or None if the folder contains no manifest.

        Raises:
          UserError: `manifest_of` does not accept the manifest, or `overwrite` is False and the
            manifest belongs to another run.
        """
        if not (self.folder / MANIFEST).exists():
            return None
        found = manifest_of(self.folder, overwrite)
        if not overwrite:
            check_same(self.folder, found, self.manifest)
        return found

    def check_new(self) -> None:
        """Check that a folder without a manifest is empty.

        Subfolders of a run are ignored if they contain no files. The lock, temporary and status
        files of a process that was killed at startup are also ignored.

        Raises:
          UserError: the folder has no manifest and contains other files, or one of the folders of a
            run is a symbolic link.
        """
        if not self.folder.is_dir():
            return
        check_links(self.folder)
        if (self.folder / MANIFEST).exists():
            return
        left = {path.name for path, target, _ in leftovers(self.folder)
                if target in (MANIFEST, STATUS)}
        if not all(is_lock(entry.name) or entry.name in left or entry.name == STATUS
                   or (entry.name in (*PARTS, live.FOLDER)
                       and entry.is_dir() and not entry.is_symlink()
                       and not any(p.is_file() for p in entry.rglob("*")))
                   for entry in self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty and has no run.json; choose another "
                            "folder")

    def _extend(self, old: Mapping[str, Any]) -> None:
        """Add the stored roles, questions and judges to the manifest, and fill `notices`."""
        for field in GROWING:
            before, now = old.get(field, {}), self.manifest.get(field, {})
            if (more := sorted(set(now) - set(before))) and field != "judges":
                names = ", ".join(more[:5]) + (", …" if len(more) > 5 else "")
                self.notices.append(f"the run is extended; new {field} ({len(more)}): {names}")
            self.manifest[field] = {**before, **now}
        if IMPORTED in old:
            if IMPORTED not in self.manifest:
                self.notices.append(continued(old[IMPORTED]))
            self.manifest[IMPORTED] = old[IMPORTED]
        before, now = old.get(LAST, {}), self.manifest.get(LAST, {})
        for field in sorted(set(before) & set(now)):
            if before[field] != now[field]:
                self.notices.append(f"{field} was {shown(before[field])}, now "
                                    f"{shown(now[field])}; existing results are reused")

    def binding(self, role: str) -> str:
        """Return the digest of the data that determine a role's rollouts, except the questions."""
        return digest([self.manifest.get(field) for field in BOUND]
                      + [role, self.manifest["roles"][role]])

    @property
    def judge(self) -> str:
        """The name of the judge of the last call, or "" if the manifest has no field "last"."""
        return str(self.manifest.get(LAST, {}).get("judge", ""))

    def path(self, part: str, role: str, judge: str | None = None) -> pathlib.Path:
        """Return the path of a role's file (`files.path_of`)."""
        return path_of(self.folder, part, role, self.judge if judge is None else judge)

    def live(self, role: str, shape: tuple[int, int], *, repair: bool = True) -> live.Live:
        """Open the live files of a role; see `live.Live` for `shape` and `repair`."""
        return live.Live(self.folder, role, self.binding(role), shape, repair=repair)

    def rollouts(self, role: str) -> list[dict[str, Any]] | None:
        """Return the rollouts in a role's rollouts file, or None if there is no file.

        Raises:
          Damaged: see `rollouts_bytes`.
        """
        data = self.rollouts_bytes(role)
        return None if data is None else self.parsed(data)

    @staticmethod
    def parsed(data: bytes) -> list[dict[str, Any]]:
        """Parse the content of a rollouts file and return the rollouts."""
        # not splitlines(): replies may contain other line separators, such as U+2028
        return [json.loads(line) for line in data.decode("utf-8", "surrogatepass").split("\n")
                if line]

    def rollouts_bytes(self, role: str) -> bytes | None:
        """Return the verified content of a role's rollouts file, or None if there is no file.

        Raises:
          Damaged: the file cannot be read or differs from the content that the run wrote, or the
            sample file, which contains the digest of the rollouts, is missing or damaged.
        """
        path = self.path("rollouts", role)
        if not os.path.lexists(path):
            return None
        try:
            require_file(path)
            # hash in chunks: a file that the run did not write may not fit in memory
            with open(path, "rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual not in self._digests(role):
                raise Damaged(role, path, "differs from the rollouts that the run wrote")
            return path.read_bytes()
        except Damaged:
            raise
        except (OSError, UserError) as error:
            raise Damaged(role, path, str(error).removeprefix(f"{path}: ")) from None

    def _digests(self, role: str) -> tuple[str, str]:
        """Return the digests of a role's rollouts file now and before its last change (or "")."""
        if role not in self._known:
            self.sample(role)
        return self._known[role]

    def sample(self, role: str) -> Sample:
        """Return the sample of a role's response means.

        Raises:
          Damaged: as for `seal.read_sealed`.
        """
        tensors, about = read_sealed(self.path("samples", role), role, self.binding(role))
        self._known[role] = about["rollouts"], about["before"]
        return Sample(json.loads(about["keys"]), tensors["base"], tensors["differences"])

    def sums(self, role: str, judge: str | None = None) -> Sums | None:
        """Return a role's response means, summed by a judge's scores; None if there is no file.

        Raises:
          Damaged: as for `seal.read_sealed`, except for a missing file.
        """
        path = self.path("sums", role, judge)
        if not os.path.lexists(path):
            return None
        return Sums.read(*read_sealed(path, role, self.binding(role)))

    def verdicts(self, role: str, judge: str | None = None) -> dict[str, Any] | None:
        """Return a judge's scores file for a role; None without a file or for the default persona.

        The fields are `role`, `binding`, `judge`, `rubric`, `scores` (key → score or None, in the
        order of the rollouts) and `details` (key → the other fields of the verdict).

        Raises:
          Damaged: the file was changed, belongs to another role or run, or lacks a field.
        """
        path = self.path("scores", role, judge)
        if role == DEFAULT or not os.path.lexists(path):
            return None
        found = read_sealed_json(path, role, self.binding(role))
        if not isinstance(found.get("scores"), dict) or not isinstance(found.get("details"), dict):
            raise Damaged(role, path, "'scores' or 'details' is missing or not an object")
        found["scores"] = dict(sorted(found["scores"].items(),
                                      key=lambda item: place_of_key(item[0])))
        return found

    def scores(self, role: str, judge: str | None = None) -> dict[str, int | None] | None:
        """Return a dict from `rollout_key` to score for a role, or None if there is no file.

        An undecided score is None. Rollouts on which the judge failed are omitted.

        Raises:
          Damaged: see `verdicts`.
        """
        found = self.verdicts(role, judge)
        if found is None:
            return None
        return {key: score for key, score in found["scores"].items()
                if "error" not in found["details"].get(key, {})}

    def save_rollouts(self, role: str, text: str) -> None:
        """Write a role's rollouts; the caller must first record their digest with `save_sample`."""
        path, data = self.path("rollouts", role), text.encode("utf-8", "surrogatepass")
        if not path.exists() or path.read_bytes() != data:
            with atomic(path) as temporary:
                temporary.write_bytes(data)

    def save_sample(self, role: str, sample: Sample, text: str) -> None:
        """Write a role's sample with the digest of `text`, the content of the rollouts file."""
        sealed, before = sha256(text.encode("utf-8", "surrogatepass")), ""
        if os.path.lexists(self.path("samples", role)):
            now, before = self._digests(role)
            before = before if now == sealed else now
        write_sealed(self.path("samples", role),
                     {"base": sample.base, "differences": sample.differences},
                     {"role": role, "binding": self.binding(role), "rollouts": sealed,
                      "before": before, "keys": json.dumps(sample.keys)})
        self._known[role] = sealed, before

    def save_verdicts(self, role: str, judge: str, rubric: str, scores: Mapping[str, int | None],
                      details: Mapping[str, Mapping[str, Any]]) -> None:
        """Write a judge's scores, and in `details` the other fields of its verdicts, by key."""
        write_sealed_json(self.path("scores", role, judge), {
            "role": role, "binding": self.binding(role), "judge": judge, "rubric": rubric,
            "scores": dict(scores), "details": {key: dict(value) for key, value in details.items()
                                                if value}})

    def save_sums(self, role: str, judge: str, sums: Sums) -> None:
        """Write a role's response means, summed by a judge's scores."""
        tensors, about = sums.stored()
        write_sealed(self.path("sums", role, judge), tensors,
                     {**about, "role": role, "binding": self.binding(role)})

    def save_vectors(self, role: str, vectors: Mapping[str, tuple[np.ndarray, int]]) -> None:
        """Write a role's vectors: a dict from label to (vector [L, D], number of rollouts)."""
        write_sealed(self.path("vectors", role),
                     {label: vector for label, (vector, _) in vectors.items()},
                     {"role": role, "binding": self.binding(role),
                      **{f"count_{label}": str(n) for label, (_, n) in vectors.items()}})

    def vectors(self, role: str) -> dict[str, np.ndarray]:
        """Return a role's vectors: a dict from label to vector [L, D].

        Raises:
          Damaged: as for `seal.read_sealed`.
        """
        return read_sealed(self.path("vectors", role), role, self.binding(role))[0]

    def discard(self, role: str) -> None:
        """Delete a role's files, so that its rollouts are generated again.

        Raises:
          UserError: a file cannot be deleted.
        """
        self._known.pop(role, None)
        delete_role(self.folder, role, self.manifest.get("judges", {}))

    def forget(self, role: str, judge: str, part: str) -> None:
        """Delete a judge's scores file or sums file for a role; `part` is "scores" or "sums"."""
        delete(self.path(part, role, judge))
