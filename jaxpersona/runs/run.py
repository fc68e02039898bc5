"""A run as a folder: what it is, its files, and whether work may go on in it.

    run.json                     model, arguments, what was asked, device, settings and versions
    rollouts/<role>.jsonl        one conversation a line
    means/<role>.safetensors     the response means of those conversations [n, L, D]
    scores/<role>.json           what the judge gave them
    vectors/<role>.safetensors   their means by score
    axis.safetensors             the axis with its thresholds
    analysis.json                the figures of the run
    .lock                        while a process writes to the folder

Every file is written to a temporary name and renamed, and holds no clock (a model goes by the name
that it was given, which for a folder is its path as it was written), so that a run killed anywhere
resumes and ends in the same bytes.

Means, scores and vectors carry a SHA-256 digest of their content, of their role and of the run
(`Run.identity`, the digest of run.json). The means also carry the digest of the rollouts, and the
scores that of the rollouts that were judged. So a file that was edited, damaged, or taken from
another role or run is refused. Vectors, axis and analysis are computed and written anew each time.
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
from jaxpersona.inputs import TEXT_BYTES, read_bytes, read_json, require_file
from jaxpersona.runs.damage import Damaged
from jaxpersona.runs.lock import is_lock, locked
from jaxpersona.runs.names import file_stem

FORMAT = "jaxpersona-run 2"
FIGURES = ("roles.png", "pca.png", "variance.png", "drift.png")
_FILES = ("run.json", "axis.safetensors", "analysis.json")
_PARTS = {"rollouts": ".jsonl", "means": ".safetensors", "scores": ".json",
          "vectors": ".safetensors"}


class Run:
    """The files of one run. `Run.open` begins a run or goes on with it; `Run.read` only reads."""

    def __init__(self, folder: str | os.PathLike, manifest: Mapping[str, Any]) -> None:
        """Name a run; nothing is read or written.

        Attributes:
          identity: the digest of the manifest, which every sealed file carries.
        """
        self.folder = pathlib.Path(folder)
        self.manifest = json.loads(json.dumps({"format": FORMAT, **manifest}))
        self.identity = _sha256(json_text(self.manifest).encode())
        self._written: dict[str, str] = {}  # role → the digest of its rollouts that its means hold

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Run:
        """Return the run that a folder holds, to read its files.

        Raises:
          ValueError: the folder holds no run of this format.
        """
        folder = pathlib.Path(folder)
        found = _manifest_of(folder)
        return cls(folder, found)

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: str | os.PathLike, manifest: Mapping[str, Any],
             worker: int = 0) -> Iterator[Run]:
        """Begin a run or go on with it; no other process may write to the folder meanwhile.

        Args:
          folder: a new or an empty folder, or one of the same manifest.
          manifest: a JSON value that holds all that the run's files depend on.
          worker: which of the run's processes this is; process 0 must come first.

        Raises:
          ValueError: the folder is another run's (each differing field is named), is in use, holds
            something else, or cannot be written.
        """
        run = cls(folder, manifest)
        folder, path = run.folder, run.folder / "run.json"
        if folder.is_dir() and not path.exists() and not run._is_new():
            raise ValueError(f"{folder}: is not empty and holds no run.json; choose another")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written ({error.strerror or error})") from None
        with locked(folder, worker):
            if path.exists():
                _same(folder, _manifest_of(folder), run.manifest)
            try:
                for part in _PARTS:
                    (folder / part).mkdir(exist_ok=True)
            except OSError as error:
                raise ValueError(f"{folder / part}: cannot be written ({error.strerror or error})"
                                 ) from None
            if worker == 0:
                run._remove_leftovers()
                if not path.exists() or path.read_bytes() != json_text(run.manifest).encode():
                    write_json(path, run.manifest)  # new, or the same values in another form
            yield run

    def _is_new(self) -> bool:
        """Whether the folder holds nothing but what a process leaves that is killed at its start.
        """
        left = {path.name for path, target, _ in leftovers(self.folder) if target == "run.json"}
        return all(
            is_lock(entry.name) or entry.name in left
            or (entry.name in _PARTS and entry.is_dir() and not any(entry.iterdir()))
            for entry in self.folder.iterdir())

    def _remove_leftovers(self) -> None:
        """Remove this run's own temporary files, of processes that were killed while they wrote.

        The lock is held, so no process of the run is writing; but figures are drawn after it is
        released, so theirs are removed only where the process that wrote them has ended.
        """
        stems = {file_stem(role) for role in self.manifest.get("roles", {})}
        for path, target, process in leftovers(self.folder):
            if target in _FILES or (target in FIGURES and not _alive(process)):
                path.unlink(missing_ok=True)
        for part, suffix in _PARTS.items():
            for path, target, _ in leftovers(self.folder / part):
                if target.endswith(suffix) and target.removesuffix(suffix) in stems:
                    path.unlink(missing_ok=True)

    def path(self, part: str, role: str) -> pathlib.Path:
        """Return where a role's rollouts, means, scores or vectors are kept."""
        return self.folder / part / f"{file_stem(role)}{_PARTS[part]}"

    def rollouts(self, role: str) -> list[dict[str, Any]] | None:
        """Return a role's conversations, or None if they are not all there yet.

        Raises:
          Damaged: they are not those that the run wrote.
        """
        path = self.path("rollouts", role)
        if not _there(path):
            return None
        try:
            require_file(path)
            with open(path, "rb") as file:  # piece by piece: another file may exceed the memory
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self._rollouts_digest(role):
                raise Damaged(role, path, "not the rollouts that the run wrote")
            data = path.read_bytes()
        except Damaged:
            raise
        except (OSError, ValueError) as error:
            raise Damaged(role, path, str(error).removeprefix(f"{path}: ")) from None
        # split at newlines alone: a reply may hold any other separator of lines
        return [json.loads(line) for line in data.decode().split("\n") if line]

    def means(self, role: str) -> np.ndarray:
        """Return a role's response means [n, L, D] float32.

        Raises:
          Damaged: they are not those that the run wrote.
        """
        tensors, about = self._sealed("means", role)
        self._written[role] = about["rollouts"]
        return tensors["response"]

    def _rollouts_digest(self, role: str) -> str:
        """Return the digest of a role's rollouts; the means that hold it are checked once."""
        if role not in self._written:
            self.means(role)
        return self._written[role]

    def save_rollouts(self, role: str, records: Sequence[Mapping[str, Any]],
                      means: np.ndarray) -> None:
        """Keep a role's conversations and means; the conversations come last and make it whole."""
        lines = [json.dumps(r, ensure_ascii=False, sort_keys=True) for r in records]
        text = "\n".join(lines) + "\n"
        self._written[role] = _sha256(text.encode())
        self._seal("means", role, {"response": np.asarray(means, np.float32)},
                   {"rollouts": self._written[role]})
        write_text(self.path("rollouts", role), text)

    def scores(self, role: str) -> dict[str, int | None] | None:
        """Return what the judge gave a role's rollouts, by `rollout_key`, or None.

        Raises:
          Damaged: they are not those that the run wrote, or of other rollouts.
        """
        path = self.path("scores", role)
        if not _there(path):
            return None
        try:
            data = read_bytes(path, TEXT_BYTES)
        except ValueError as error:
            raise Damaged(role, path, str(error).removeprefix(f"{path}: ")) from None
        try:
            found = json.loads(data)
            scores = found["scores"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Damaged(role, path, "no table of scores") from None
        if not _are_scores(scores) or data != json_text(self._scored(role, scores)).encode():
            raise Damaged(role, path, "not the scores that the run wrote for its rollouts")
        return scores

    def save_scores(self, role: str, scores: Mapping[str, int | None]) -> None:
        """Keep what the judge gave a role's rollouts.

        Raises:
          ValueError: a score that is not 0, 1, 2, 3 or None.
        """
        if not _are_scores(scores):
            wrong = [repr(s) for s in scores.values() if not _is_score(s)]
            raise ValueError(f"the judge scored a rollout of role {role!r} {wrong[0][:80]}; scores "
                             "are 0, 1, 2, 3 or None")
        write_json(self.path("scores", role), self._scored(role, dict(scores)))

    def _scored(self, role: str, scores: Any) -> dict[str, Any]:
        about = {"run": self.identity, "role": role, "scores": scores,
                 "rollouts": self._rollouts_digest(role)}
        return about | {"digest": _sha256(json_text(about).encode())}

    def save_vectors(self, role: str, vectors: Mapping[str, tuple[np.ndarray, int]]) -> None:
        """Keep a role's vectors and how many rollouts are in each."""
        self._seal("vectors", role, {label: vector for label, (vector, _) in vectors.items()},
                   {f"count_{label}": str(n) for label, (_, n) in vectors.items()})

    def is_whole(self, role: str) -> bool:
        """Whether a role's rollouts are there; checks them and its means and scores.

        Raises:
          Damaged: one of the files is not what the run wrote.
        """
        if self.rollouts(role) is None:
            return False
        self.scores(role)
        return True

    def discard(self, role: str) -> None:
        """Remove a role's files, so that they are made anew.

        Raises:
          ValueError: one of them cannot be removed.
        """
        self._written.pop(role, None)
        for part in ("vectors", "scores", "rollouts", "means"):
            path = self.path(part, role)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise ValueError(f"{path}: cannot be removed ({error.strerror or error})"
                                 ) from None

    def _seal(self, part: str, role: str, tensors: Mapping[str, np.ndarray],
              about: Mapping[str, str]) -> None:
        about = {**about, "run": self.identity, "role": role}
        held = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        sealed = _tensors_digest(about, {name: (x.dtype, x.shape) for name, x in held.items()},
                                 lambda name: [held[name].reshape(-1).view(np.uint8).data])
        write_tensors(self.path(part, role), held, about | {"digest": sealed})

    def _sealed(self, part: str, role: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Read a file that `_seal` wrote: its tensors and what it says of itself.

        Nothing is held in memory before its digest is right.

        Raises:
          Damaged: it is missing, or not what this run wrote for this role.
        """
        path = self.path(part, role)
        try:
            entries, about = read_entries(path)
            shapes = {name: (READABLE[e.dtype], e.shape) for name, e in entries.items()}
            with open(path, "rb") as file:
                whole = header_of(shapes, about)
                same = file.read(len(whole)) == whole
        except (ValueError, OSError, KeyError) as error:  # the last: a dtype that is not written
            why = str(error).removeprefix(f"{path}: ")
            raise Damaged(role, path, why) from None
        said = about.pop("digest", "")
        if about.get("run") != self.identity or about.get("role") != role:
            raise Damaged(role, path, "of another role or run")
        try:
            if not same or said != _tensors_digest(about, shapes,
                                                   lambda name: read_bytes_of(entries[name])):
                raise Damaged(role, path, "not what the run wrote")
            tensors = {name: read_slice(entry) for name, entry in entries.items()}
        except Damaged:
            raise
        except ValueError as error:  # the disk fails, or the file became shorter
            raise Damaged(role, path, str(error).removeprefix(f"{path}: ")) from None
        return tensors, about


def rollout_key(record: Mapping[str, Any]) -> str:
    """Name a rollout within its role: label, prompt, question and, beyond the first, sample."""
    key = f"{record['label']}_p{record['prompt_index']}_q{record['question_index']}"
    return f"{key}_s{record['sample']}" if record.get("sample") else key


def digest(value: Any) -> str:
    """Return sixteen hexadecimal digits that change with any part of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return _sha256(text.encode("utf-8", "surrogatepass"))[:16]


def _tensors_digest(about: Mapping[str, str], shapes: Mapping[str, tuple[Any, tuple[int, ...]]],
                    parts: Callable[[str], Iterable[Any]]) -> str:
    """Return the digest of what a file says of itself and of its tensors, whose bytes `parts`
    gives."""
    found = hashlib.sha256(json_text(dict(about)).encode())
    for name in sorted(shapes):
        dtype, shape = shapes[name]
        found.update(f"{name} {dtype.str} {shape}\n".encode())
        for part in parts(name):
            found.update(part)
    return found.hexdigest()


def _is_score(value: Any) -> bool:
    return value is None or (type(value) is int and 0 <= value <= 3)  # true is no score


def _are_scores(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_score, value.values()))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _there(path: pathlib.Path) -> bool:
    return os.path.lexists(path)


def _alive(process: int) -> bool:
    """Whether a process of this machine has not ended."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _manifest_of(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "run.json"
    require_file(path)
    found = read_json(path)
    said = found.get("format") if isinstance(found, dict) else None
    if isinstance(said, str) and said.startswith("jaxpersona-run ") and said != FORMAT:
        raise ValueError(f"{folder}: its run.json is of the format {said!r}, this version writes "
                         f"{FORMAT!r}; go on with the version that began it, or choose another "
                         "folder")
    if said != FORMAT:
        raise ValueError(f"{folder}: its run.json is not one of this engine's runs")
    return found


def _same(folder: pathlib.Path, found: Any, wanted: Mapping[str, Any]) -> None:
    def flat(value: Any, prefix: str = "") -> dict[str, str]:
        if not isinstance(value, dict):
            return {prefix: json.dumps(value)}  # text, for 1, 1.0 and true are equal
        pairs = (flat(v, f"{prefix}.{k}" if prefix else k) for k, v in value.items())
        return {key: item for pair in pairs for key, item in pair.items()}

    old, new = flat(found), flat(dict(wanted))
    differ = [
        f"{key} was {old.get(key, 'absent')}, now {new.get(key, 'absent')}"
        for key in sorted(set(old) | set(new))
        if old.get(key) != new.get(key)
    ]
    if differ:
        raise ValueError(
            f"{folder}: holds another run ({'; '.join(differ)}); choose another folder"
        )
