"""A run as a folder: what it is, its files, and whether work may go on in it.

    run.json                     model and fingerprint, arguments, what was asked, versions
    rollouts/<role>.jsonl        one conversation a line
    means/<role>.safetensors     the response means of those conversations [n, L, D]
    scores/<role>.json           what the judge gave them
    vectors/<role>.safetensors   their means by score
    axis.safetensors             the axis with its thresholds

Every file is written to a temporary name and renamed, and holds no clock (a model goes by the name
that it was given, which for a folder is its path as it was written), so that a run
killed anywhere resumes and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpersona.ckpts.files import read_tensors, write_json, write_tensors, write_text
from jaxpersona.inputs import parse_json, read_bytes, read_json

FORMAT = "jaxpersona-run 1"
_RECORD = {"label", "prompt_index", "question_index", "question", "conversation"}


class Run:
    """One run folder, opened to begin or to go on."""

    def __init__(self, folder: str | os.PathLike, manifest: Mapping[str, Any]) -> None:
        """Create the folder, or check that it holds a run of the same manifest.

        Raises:
          ValueError: the folder is another run's (each differing field is named), holds something
            else, or cannot be written.
        """
        self.folder = pathlib.Path(folder)
        self.manifest = json.loads(json.dumps({"format": FORMAT, **manifest}))
        path = self.folder / "run.json"
        if self.folder.is_dir() and (path.exists() or list(self.folder.glob(".run.json.*.tmp"))):
            for stale in self.folder.rglob(".*.tmp"):  # of a run that was killed while it wrote
                stale.unlink(missing_ok=True)
        if path.exists():
            _same(self.folder, read_json(path), self.manifest)
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder}: is not empty and holds no run.json; choose another")
        else:
            write_json(path, self.manifest)

    def rollouts(self, role: str) -> list[dict[str, Any]] | None:
        """Return a role's conversations, or None if they are not all there yet."""
        path = self.folder / "rollouts" / f"{role}.jsonl"
        if not path.exists():
            return None
        try:
            # split at newlines alone: a reply may hold any other separator of lines
            lines = read_bytes(path, limit=1 << 34).decode("utf-8").split("\n")
            records = [parse_json(line) for line in lines if line]
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}); delete it to make it anew") from None
        if not all(isinstance(record, dict) and _RECORD <= set(record) for record in records):
            raise ValueError(f"{path}: damaged (not a table a line); delete it to make it anew")
        return records

    def means(self, role: str) -> np.ndarray:
        """Return a role's response means [n, L, D] float32."""
        path = self.folder / "means" / f"{role}.safetensors"
        tensors, _ = read_tensors(path)
        if "response" not in tensors or tensors["response"].ndim != 3:
            raise ValueError(f"{path}: damaged (no means in it); delete it and the role's rollouts")
        return tensors["response"]

    def save_rollouts(self, role: str, records: Sequence[Mapping[str, Any]],
                      means: np.ndarray) -> None:
        """Keep a role's conversations and means; the conversations come last and make it whole."""
        write_tensors(self.folder / "means" / f"{role}.safetensors",
                      {"response": means.astype(np.float32)}, {"role": role})
        lines = [json.dumps(r, ensure_ascii=False, sort_keys=True) for r in records]
        write_text(self.folder / "rollouts" / f"{role}.jsonl", "\n".join(lines) + "\n")

    def scores(self, role: str) -> dict[str, int | None] | None:
        """Return what the judge gave a role's rollouts, by `rollout_key`, or None."""
        path = self.folder / "scores" / f"{role}.json"
        if not path.exists():
            return None
        found = read_json(path)
        if not isinstance(found, dict) or any(
                not (score is None or (type(score) is int and 0 <= score <= 3))
                for score in found.values()):
            raise ValueError(f"{path}: damaged (no scores 0–3); delete it to judge anew")
        return found

    def save_scores(self, role: str, scores: Mapping[str, int | None]) -> None:
        """Keep what the judge gave a role's rollouts."""
        write_json(self.folder / "scores" / f"{role}.json", dict(scores))

    def save_vectors(self, role: str, vectors: Mapping[str, tuple[np.ndarray, int]]) -> None:
        """Keep a role's vectors and how many rollouts are in each."""
        write_tensors(
            self.folder / "vectors" / f"{role}.safetensors",
            {label: vector for label, (vector, _) in vectors.items()},
            {"role": role, **{f"count_{label}": str(n) for label, (_, n) in vectors.items()}},
        )


def rollout_key(record: Mapping[str, Any]) -> str:
    """Name a rollout within its role: label, prompt, question and, beyond the first, sample."""
    key = f"{record['label']}_p{record['prompt_index']}_q{record['question_index']}"
    return f"{key}_s{record['sample']}" if record.get("sample") else key


def digest(value: Any) -> str:
    """Return sixteen hexadecimal digits that change with any part of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _same(folder: pathlib.Path, found: Any, wanted: Mapping[str, Any]) -> None:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{folder}: its run.json is not one of this engine's runs")

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        pairs = (flat(v, f"{prefix}.{k}" if prefix else k) for k, v in value.items())
        return {key: item for pair in pairs for key, item in pair.items()}

    old, new = flat(found), flat(dict(wanted))
    differ = [
        f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(set(old) | set(new))
        if old.get(key) != new.get(key)
    ]
    if differ:
        raise ValueError(
            f"{folder}: holds another run ({'; '.join(differ)}); choose another folder"
        )
