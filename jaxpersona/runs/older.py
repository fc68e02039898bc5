"""Read run folders of format 2, so that a new run can copy the rollouts, means and scores."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxpersona.ckpts.files import read_tensors
from jaxpersona.errors import UserError
from jaxpersona.inputs import read_bytes, read_json
from jaxpersona.runs.compare import OLDER
from jaxpersona.runs.files import MANIFEST
from jaxpersona.runs.names import file_stem
from jaxpersona.runs.seal import sha256

_LIMIT = 16 << 30  # maximum size of a role's rollouts file in bytes


class Older:
    """A run folder of format 2, opened read-only."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Read the manifest of a run folder.

        Raises:
          UserError: the folder contains no run of format 2.
        """
        self.folder = pathlib.Path(folder)
        found: Any = read_json(self.folder / MANIFEST)
        if not isinstance(found, dict) or found.get("format") != OLDER:
            raise UserError(f"{self.folder}: is not a run folder of format 2; run folders of this "
                            "version need no --take-from")
        self.manifest: dict[str, Any] = found

    @property
    def judge(self) -> str:
        """The name of the run's judge; "" if the manifest contains none."""
        return str(self.manifest.get("arguments", {}).get("judge", ""))

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Check that this run used the same model, settings and device as the given manifest.

        Prompts and questions are not checked; `same` compares them for each rollout.

        Raises:
          UserError: a field of the model, the settings or the device differs.
        """
        differ = []
        for part in ("model", "arguments", "numerics"):
            old, new = self.manifest.get(part, {}), manifest[part]
            # format 2 lacks some fields, such as share_prefix, which is compared below
            differ += [f"{part}.{key} was {old[key]!r}, now {new[key]!r}"
                       for key in sorted(set(old) & set(new)) if old[key] != new[key]]
        if manifest["arguments"].get("share_prefix"):
            differ.append("arguments.share_prefix was False, now True")
        if differ:
            raise UserError(f"{self.folder}: its rollouts are from another run ({'; '.join(differ)}"
                            "); use the same model, settings and device, or omit --take-from")

    def rollouts(self, role: str) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Yield each rollout of a role with its response mean [L, D], if the folder contains any.

        Raises:
          UserError: a file is damaged.
        """
        stem = file_stem(role)
        text = self.folder / "rollouts" / f"{stem}.jsonl"
        if not text.exists():
            return
        means = self.folder / "means" / f"{stem}.safetensors"
        data = read_bytes(text, _LIMIT)
        tensors, about = read_tensors(means)
        values, records = tensors.get("response"), None
        if about.get("rollouts") == sha256(data):  # so `data` is valid JSON
            records = [json.loads(line) for line in data.decode().split("\n") if line]
        if records is None or values is None or about.get("role") != role or (
                len(values) != len(records)):
            raise UserError(f"{means}: damaged (does not belong to {text}); delete both files, so "
                            "that the role is generated again")
        yield from zip(records, values, strict=True)

    def scores(self, role: str) -> dict[str, int | None]:
        """Return key → score of a role's rollouts; {} if the role was not judged.

        Raises:
          UserError: the file is damaged.
        """
        path = self.folder / "scores" / f"{file_stem(role)}.json"
        if not path.exists():
            return {}
        found: Any = read_json(path)
        scores = found.get("scores") if isinstance(found, dict) else None
        if not isinstance(scores, dict) or not all(
                x is None or (type(x) is int and 0 <= x <= 3) for x in scores.values()):
            raise UserError(f"{path}: damaged ('scores' is not an object with values from 0 "
                            "to 3 or null); delete it, so that the role is judged again")
        return scores


def same(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether a stored and a planned rollout have equal system prompts and questions."""
    return all(field in wanted and record.get(field) == wanted[field]
               for field in ("system_prompt", "question"))
