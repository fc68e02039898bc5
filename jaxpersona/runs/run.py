"""The run folder: its files, their digests, and the checks on resume.

    run.json                     manifest: model, arguments, texts, device, settings, versions
    rollouts/<role>.jsonl        one conversation per line
    means/<role>.safetensors     the response means of those conversations [n, L, D]
    scores/<role>.json           the judge's scores
    vectors/<role>.safetensors   means of the response means by score
    axis.safetensors             the axis with its thresholds
    analysis.json                cosines, variance ratios and projections
    .lock                        exists while a process writes to the folder

Every file is written under a temporary name and renamed, and contains no timestamp, so a run killed
at any point resumes and produces the same bytes. run.json stores the model's name as given; for a
folder, this is the path as typed.

Means, scores and vectors contain a SHA-256 digest of their content, their role and the run
(`Run.identity`, the digest of run.json). Means and scores also contain the digest of their
rollouts. Files that were edited, damaged, or copied from another role or run are therefore rejected
when they are read. Vectors, axis and analysis are recomputed whenever a run starts or resumes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpersona.ckpts.files import (
    header_of,
    json_text,
    leftovers,
    read_entries,
    write_json,
    write_tensors,
    write_text,
)
from jaxpersona.ckpts.tensorfile import READABLE, read_bytes_of, read_slice
from jaxpersona.errors import UserError
from jaxpersona.inputs import TEXT_BYTES, read_bytes, read_json, require_file
from jaxpersona.runs.damage import Damaged
from jaxpersona.runs.files import MANIFEST, PARTS, delete, delete_run, path_of, remove_leftovers
from jaxpersona.runs.lock import is_lock, locked
from jaxpersona.runs.names import check_names

FORMAT = "jaxpersona-run 2"


class Run:
    """The files of one run: `Run.open` starts or resumes it, `Run.read` opens it read-only."""

    def __init__(self, folder: str | os.PathLike, manifest: Mapping[str, Any]) -> None:
        """Create a handle without reading or writing files.

        Attributes:
          identity: digest of the manifest, stored in every sealed file.
        """
        self.folder = pathlib.Path(folder)
        self.manifest = json.loads(json.dumps({"format": FORMAT, **manifest}))
        self.identity = _sha256(json_text(self.manifest).encode())
        self._written: dict[str, str] = {}  # role → digest of its rollouts, from its means file

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Run:
        """Return the run in a folder, for reading.

        Raises:
          UserError: the folder contains no run of this format.
        """
        folder = pathlib.Path(folder)
        return cls(folder, _manifest_of(folder))

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: str | os.PathLike, manifest: Mapping[str, Any], worker: int = 0, *,
             overwrite: bool = False) -> Iterator[Run]:
        """Start or resume a run, with the folder locked against other runs.

        Args:
          folder: a new or empty folder, or one with an equal manifest.
          manifest: a JSON value with everything that the run's files depend on.
          worker: index of this process in the run; process 0 must open first.
          overwrite: delete the files of the run in the folder, this one or another, and start a
            new run. Files that no run wrote stay.

        Raises:
          UserError: the folder belongs to another run (the message lists the differing fields),
            is in use, contains other files, or cannot be written.
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
                delete_run(folder, _roles_of(folder, old))
            for part in PARTS:
                try:
                    (folder / part).mkdir(exist_ok=True)
                except OSError as error:
                    raise UserError(f"{folder / part}: cannot be written "
                                    f"({error.strerror or error})") from None
            if worker == 0:
                remove_leftovers(folder, _roles_of(folder, run.manifest))
                if not path.exists() or path.read_bytes() != json_text(run.manifest).encode():
                    write_json(path, run.manifest)  # missing, or equal in another JSON layout
            yield run

    def stored(self, overwrite: bool = False) -> dict[str, Any] | None:
        """Return the manifest in the folder, or None if it has none.

        Raises:
          UserError: it is not that of a run of this format, or, unless `overwrite`, of another run.
        """
        if not (self.folder / MANIFEST).exists():
            return None
        found = _manifest_of(self.folder)
        if not overwrite:
            _same(self.folder, found, self.manifest)
        return found

    def check_new(self) -> None:
        """Check that a folder without a manifest is empty.

        Files of a process killed at its start do not count.

        Raises:
          UserError: the folder has no manifest and contains other files.
        """
        if not self.folder.is_dir() or (self.folder / MANIFEST).exists():
            return
        left = {path.name for path, target, _ in leftovers(self.folder) if target == MANIFEST}
        if not all(is_lock(entry.name) or entry.name in left
                   or (entry.name in PARTS and entry.is_dir() and not any(entry.iterdir()))
                   for entry in self.folder.iterdir()):
            raise UserError(f"{self.folder}: is not empty and has no run.json; choose another "
                            "folder")

    def path(self, part: str, role: str) -> pathlib.Path:
        """Return the path of a role's rollouts, means, scores or vectors."""
        return path_of(self.folder, part, role)

    def rollouts(self, role: str) -> list[dict[str, Any]] | None:
        """Return a role's rollouts, or None if they are not complete yet.

        Raises:
          Damaged: the file differs from what the run wrote.
        """
        path = self.path("rollouts", role)
        if not _there(path):
            return None
        try:
            require_file(path)
            # hashed in chunks: a file that the run did not write may be too large for memory
            with open(path, "rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != self._rollouts_digest(role):
                raise Damaged(role, path, "differs from the rollouts that the run wrote")
            data = path.read_bytes()
        except Damaged:
            raise
        except (OSError, UserError) as error:
            raise Damaged(role, path, str(error).removeprefix(f"{path}: ")) from None
        # split at "\n" only: replies may contain other line separators
        return [json.loads(line) for line in data.decode().split("\n") if line]

    def means(self, role: str) -> np.ndarray:
        """Return a role's response means [n, L, D] float32.

        Raises:
          Damaged: the file is missing or differs from what the run wrote.
        """
        tensors, about = self._sealed("means", role)
        self._written[role] = about["rollouts"]
        return tensors["response"]

    def _rollouts_digest(self, role: str) -> str:
        """Return the digest of a role's rollouts, read once from its verified means file."""
        if role not in self._written:
            self.means(role)
        return self._written[role]

    def save_rollouts(self, role: str, records: Sequence[Mapping[str, Any]],
                      means: np.ndarray) -> None:
        """Write a role's means, then its rollouts, which mark the role as complete."""
        lines = [json.dumps(r, ensure_ascii=False, sort_keys=True) for r in records]
        text = "\n".join(lines) + "\n"
        self._written[role] = _sha256(text.encode())
        self._seal("means", role, {"response": np.asarray(means, np.float32)},
                   {"rollouts": self._written[role]})
        write_text(self.path("rollouts", role), text)

    def scores(self, role: str) -> dict[str, int | None] | None:
        """Return the judge's scores of a role by `rollout_key`, or None if not judged yet.

        Raises:
          Damaged: the file differs from what the run wrote, or belongs to other rollouts.
        """
        path = self.path("scores", role)
        if not _there(path):
            return None
        try:
            data = read_bytes(path, TEXT_BYTES)
        except UserError as error:
            raise Damaged(role, path, str(error).removeprefix(f"{path}: ")) from None
        try:
            scores = json.loads(data)["scores"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Damaged(role, path, "no object 'scores'") from None
        if not _are_scores(scores) or data != json_text(self._scored(role, scores)).encode():
            raise Damaged(role, path, "differs from the scores that the run wrote for its rollouts")
        return scores

    def save_scores(self, role: str, scores: Mapping[str, int | None]) -> None:
        """Write the judge's scores of a role's rollouts.

        Raises:
          UserError: a score is not 0, 1, 2, 3 or None.
        """
        if not _are_scores(scores):
            wrong = [repr(s) for s in scores.values() if not _is_score(s)]
            raise UserError(f"the judge gave a rollout of role {role!r} the score {wrong[0][:80]}; "
                            "scores must be 0, 1, 2, 3 or None")
        write_json(self.path("scores", role), self._scored(role, dict(scores)))

    def _scored(self, role: str, scores: Any) -> dict[str, Any]:
        about = {"run": self.identity, "role": role, "scores": scores,
                 "rollouts": self._rollouts_digest(role)}
        return about | {"digest": _sha256(json_text(about).encode())}

    def save_vectors(self, role: str, vectors: Mapping[str, tuple[np.ndarray, int]]) -> None:
        """Write a role's vectors and the number of rollouts averaged in each."""
        self._seal("vectors", role, {label: vector for label, (vector, _) in vectors.items()},
                   {f"count_{label}": str(n) for label, (_, n) in vectors.items()})

    def vectors(self, role: str) -> dict[str, np.ndarray]:
        """Return a role's vectors [L, D] by label.

        Raises:
          Damaged: the file is missing or differs from what the run wrote.
        """
        return self._sealed("vectors", role)[0]

    def is_whole(self, role: str) -> bool:
        """Verify a role's rollouts, means and scores, and return whether the rollouts are complete.

        Raises:
          Damaged: a file differs from what the run wrote.
        """
        if self.rollouts(role) is None:
            return False
        self.scores(role)
        return True

    def discard(self, role: str) -> None:
        """Delete a role's files, so that they are regenerated.

        Raises:
          UserError: a file cannot be deleted.
        """
        self._written.pop(role, None)
        for part in ("vectors", "scores", "rollouts", "means"):
            delete(self.path(part, role))

    def _seal(self, part: str, role: str, tensors: Mapping[str, np.ndarray],
              about: Mapping[str, str]) -> None:
        """Write tensors with metadata: `about`, run, role, and a digest of all contents."""
        about = {**about, "run": self.identity, "role": role}
        arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        sealed = _tensors_digest(about, {name: (x.dtype, x.shape) for name, x in arrays.items()},
                                 lambda name: [arrays[name].reshape(-1).view(np.uint8).data])
        write_tensors(self.path(part, role), arrays, about | {"digest": sealed})

    def _sealed(self, part: str, role: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Read a file that `_seal` wrote: its tensors and its metadata.

        The digest is verified before any tensor is loaded into memory.

        Raises:
          Damaged: the file is missing, or differs from what this run wrote for this role.
        """
        path = self.path(part, role)
        try:
            entries, about = read_entries(path)
            shapes = {name: (READABLE[e.dtype], e.shape) for name, e in entries.items()}
            with open(path, "rb") as file:
                header = header_of(shapes, about)
                same = file.read(len(header)) == header
        except (ValueError, OSError, KeyError) as error:  # KeyError: unknown dtype
            why = str(error).removeprefix(f"{path}: ")
            raise Damaged(role, path, why) from None
        stored = about.pop("digest", "")
        if about.get("run") != self.identity or about.get("role") != role:
            raise Damaged(role, path, "belongs to another role or run")
        try:
            if not same or stored != _tensors_digest(about, shapes,
                                                     lambda name: read_bytes_of(entries[name])):
                raise Damaged(role, path, "differs from what the run wrote")
            tensors = {name: read_slice(entry) for name, entry in entries.items()}
        except Damaged:
            raise
        except ValueError as error:  # a disk error, or the file was truncated
            raise Damaged(role, path, str(error).removeprefix(f"{path}: ")) from None
        return tensors, about


def rollout_key(record: Mapping[str, Any]) -> str:
    """Return a rollout's key within its role: label, prompt, question and, if not 0, sample."""
    key = f"{record['label']}_p{record['prompt_index']}_q{record['question_index']}"
    return f"{key}_s{record['sample']}" if record.get("sample") else key


def digest(value: Any) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 digest of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return _sha256(text.encode("utf-8", "surrogatepass"))[:16]


def _tensors_digest(about: Mapping[str, str], shapes: Mapping[str, tuple[Any, tuple[int, ...]]],
                    parts: Callable[[str], Iterable[Any]]) -> str:
    """Return the SHA-256 digest of a file's metadata and tensors; `parts(name)` yields bytes."""
    total = hashlib.sha256(json_text(dict(about)).encode())
    for name in sorted(shapes):
        dtype, shape = shapes[name]
        total.update(f"{name} {dtype.str} {shape}\n".encode())
        for part in parts(name):
            total.update(part)
    return total.hexdigest()


def _is_score(value: Any) -> bool:
    return value is None or (type(value) is int and 0 <= value <= 3)  # excludes bool


def _are_scores(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_score, value.values()))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _there(path: pathlib.Path) -> bool:
    return os.path.lexists(path)


def _manifest_of(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / MANIFEST
    require_file(path)
    stored = read_json(path)
    version = stored.get("format") if isinstance(stored, dict) else None
    if isinstance(version, str) and version.startswith("jaxpersona-run ") and version != FORMAT:
        raise UserError(f"{folder}: run.json has format {version!r}, but this version writes "
                        f"{FORMAT!r}; resume with the version that started the run, or choose "
                        "another folder")
    if version != FORMAT:
        raise UserError(f"{folder}: run.json is not a jaxpersona run; choose another folder")
    return stored


def _roles_of(folder: pathlib.Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the role names of a manifest.

    Raises:
      UserError: they are not valid.
    """
    roles = manifest.get("roles", {})
    if not isinstance(roles, Mapping):
        raise UserError(f"{folder / MANIFEST}: damaged (roles is not an object)")
    check_names(roles)
    return list(roles)


def _same(folder: pathlib.Path, stored: Any, wanted: Mapping[str, Any]) -> None:
    def flat(value: Any, prefix: str = "") -> dict[str, str]:
        if not isinstance(value, dict):
            return {prefix: json.dumps(value)}  # as text: 1 == 1.0 == True in Python
        pairs = (flat(v, f"{prefix}.{k}" if prefix else k) for k, v in value.items())
        return {key: item for pair in pairs for key, item in pair.items()}

    old, new = flat(stored), flat(dict(wanted))
    differ = [
        f"{key} was {old.get(key, 'absent')}, now {new.get(key, 'absent')}"
        for key in sorted(set(old) | set(new))
        if old.get(key) != new.get(key)
    ]
    if differ:
        raise UserError(
            f"{folder}: contains another run ({'; '.join(differ)}); choose another folder, or "
            "delete that run with overwrite=True (--overwrite)"
        )
