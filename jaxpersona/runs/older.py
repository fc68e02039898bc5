"""Rollouts, means and scores of run folders of format 2, whose rollouts a new run can take over."""

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

_LIMIT = 16 << 30  # bytes of a role's texts


class Older:
    """A run folder of format 2, for reading."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Read the manifest.

        Raises:
          UserError: the folder contains no run of format 2.
        """
        self.folder = pathlib.Path(folder)
        found: Any = read_json(self.folder / MANIFEST)
        if not isinstance(found, dict) or found.get("format") != OLDER:
            raise UserError(f"{self.folder}: is no run folder of an older version; folders of this "
                            "version need no --take-from")
        self.manifest: dict[str, Any] = found

    @property
    def judge(self) -> str:
        """The name of the judge."""
        return str(self.manifest.get("arguments", {}).get("judge", ""))

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Check that a new run with this manifest has the same rollouts.

        Raises:
          UserError: the weights, a setting or the device differs.
        """
        differ = []
        for part in ("model", "arguments", "numerics"):
            old, new = self.manifest.get(part, {}), manifest[part]
            # fields that older versions did not have keep their defaults
            differ += [f"{part}.{key} was {old[key]!r}, now {new[key]!r}"
                       for key in sorted(set(old) & set(new)) if old[key] != new[key]]
        if manifest["arguments"].get("share_prefix"):
            differ.append("arguments.share_prefix was False, now True")
        if differ:
            raise UserError(f"{self.folder}: its rollouts are of another run ({'; '.join(differ)})"
                            "; give the same arguments, or start without them")

    def rollouts(self, role: str) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Yield a role's rollouts with their means [L, D]; nothing if it is not complete.

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
        records = [json.loads(line) for line in data.decode().split("\n") if line]
        values = tensors.get("response")
        if about.get("rollouts") != sha256(data) or about.get("role") != role or (
                values is None or len(values) != len(records)):
            raise UserError(f"{means}: damaged (does not belong to {text}); delete both files, and "
                            "the role is generated")
        yield from zip(records, values, strict=True)

    def scores(self, role: str) -> dict[str, int | None]:
        """Return a role's scores by key; {} if there are none.

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
            raise UserError(f"{path}: damaged (no object 'scores'); delete it, and the role is "
                            "judged")
        return scores


def same(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether a stored rollout answers a planned one with the same key."""
    return all(field in wanted and record.get(field) == wanted[field]
               for field in ("system_prompt", "question"))
