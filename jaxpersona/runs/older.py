"""Read run folders of format 2, so that a new run can copy the rollouts, means and scores."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxpersona.ckpts.files import read_tensors
from jaxpersona.errors import UserError
from jaxpersona.inputs import parse_json, read_bytes, read_json
from jaxpersona.runs.compare import OLDER
from jaxpersona.runs.files import MANIFEST
from jaxpersona.runs.names import file_stem
from jaxpersona.runs.rollouts import is_rollout, rollout_key
from jaxpersona.runs.seal import sha256

_LIMIT = 16 << 30  # maximum size of a role's rollouts file in bytes
_PARTS = ("model", "arguments", "numerics")
# fields of `_PARTS` that manifests of format 2 lack
_ADDED = frozenset({"model.layers", "model.width", "arguments.share_prefix"})
_REMEDY = "delete both files, so that the role is generated again"


class Older:
    """A run folder of format 2, opened read-only.

    Attributes:
      folder: the run folder.
      manifest: the content of run.json.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Read the manifest of a run folder.

        Raises:
          UserError: the folder contains no run of format 2, or its manifest is damaged.
        """
        self.folder = pathlib.Path(folder)
        found: Any = read_json(self.folder / MANIFEST)
        if not isinstance(found, dict) or found.get("format") != OLDER:
            raise UserError(f"{self.folder} is not a run folder of format 2; run folders of this "
                            "version need no --take-from")
        for part in _PARTS:
            if not isinstance(found.get(part), dict):
                raise UserError(f"{self.folder / MANIFEST}: damaged ({part} is not an object); "
                                "restore the file, or omit --take-from")
        self.manifest: dict[str, Any] = found
        self._shape: tuple[int, int] | None = None

    @property
    def judge(self) -> str:
        """The name of the run's judge; "" if the manifest contains none."""
        return str(self.manifest["arguments"].get("judge", ""))

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Check that this run used the same model, settings and device as the given manifest.

        Prompts and questions are not checked; `same` compares them for each rollout.

        Raises:
          UserError: a field of the model, the settings or the device differs, or is missing but not
            in `_ADDED`.
        """
        differ = []
        for part in _PARTS:
            old, new = self.manifest[part], manifest[part]
            for key in sorted(new):
                name = f"{part}.{key}"
                if old.get(key) != new[key] and (key in old or name not in _ADDED):
                    was = repr(old[key]) if key in old else "absent"
                    differ.append(f"{name} was {was:.80}, now {new[key]!r:.80}")
        if manifest["arguments"].get("share_prefix"):
            differ.append("arguments.share_prefix was False, now True")
        if differ:
            raise UserError(f"{self.folder}: its rollouts are from another run ({'; '.join(differ)}"
                            "); use the same model, settings and device, or omit --take-from")
        self._shape = manifest["model"]["layers"], manifest["model"]["width"]

    def rollouts(self, role: str) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Yield each rollout of a role with its response mean [L, D], if the folder contains any.

        Raises:
          UserError: a file is damaged, or the file of the response means is missing.
        """
        stem = file_stem(role)
        text = self.folder / "rollouts" / f"{stem}.jsonl"
        if not text.exists():
            return
        means = self.folder / "means" / f"{stem}.safetensors"
        data = read_bytes(text, _LIMIT)
        tensors, about = read_tensors(means)
        values = tensors.get("response")
        if about.get("rollouts") != sha256(data) or about.get("role") != role or values is None:
            raise UserError(f"{means}: damaged (does not belong to {text}); {_REMEDY}")
        try:
            records = [parse_json(line) for line in data.decode().split("\n") if line]
        except ValueError as error:
            raise UserError(f"{text}: invalid JSON ({error}); {_REMEDY}") from None
        if not all(is_rollout(record) for record in records):
            raise UserError(f"{text}: damaged (a line is not a rollout); {_REMEDY}")
        wanted = (len(records), *(self._shape or values.shape[1:]))
        if values.shape != wanted or values.dtype.kind != "f":
            raise UserError(f"{means}: damaged (the response means are {values.dtype} "
                            f"{list(values.shape)}; expected floating-point values "
                            f"{list(wanted)}); {_REMEDY}")
        for record, mean in zip(records, values, strict=True):
            if not np.isfinite(mean).all() and not np.isnan(mean).all():  # NaN: an empty reply
                raise UserError(f"{means}: damaged (the response mean of rollout "
                                f"{rollout_key(record)} has non-finite values); {_REMEDY}")
        yield from zip(records, values, strict=True)

    def scores(self, role: str) -> dict[str, int | None]:
        """Return a dict from key to score (None: undecided); {} if the role was not judged.

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
    """Return whether a stored and a planned rollout have equal system prompts and questions.

    The result is False if `wanted` is {}, which means that no such rollout is planned.
    """
    return all(field in wanted and record.get(field) == wanted[field]
               for field in ("system_prompt", "question"))
