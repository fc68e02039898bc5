"""Verify a run's manifest, and compare it with the manifest of another call."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxpersona.ckpts.files import json_text
from jaxpersona.errors import UserError
from jaxpersona.inputs import read_json, require_file
from jaxpersona.runs.files import MANIFEST
from jaxpersona.runs.imported import IMPORTED, check_origin
from jaxpersona.runs.names import check_names
from jaxpersona.runs.seal import sha256

FORMAT = "jaxpersona-run 3"
OLDER = "jaxpersona-run 2"  # an older format; `runs.older` reads its rollouts
BOUND = ("model", "arguments", "numerics")  # fields that must not change within a run
GROWING = ("roles", "questions", "judges")  # fields to which entries may be added
DIGEST = "digest"  # field with the digest of all other fields
LAST = "last"  # field that records the last call; it is not compared


def manifest_of(folder: pathlib.Path, overwrite: bool = False) -> dict[str, Any]:
    """Verify the digest of a folder's manifest and return the manifest without the digest.

    Args:
      folder: the run folder.
      overwrite: whether the caller will delete the run. If so, format `OLDER` and a wrong digest
        are also accepted.

    Raises:
      UserError: the folder has no manifest, or its manifest is damaged or has another format.
    """
    path = folder / MANIFEST
    require_file(path)
    stored = read_json(path)
    version = stored.get("format") if isinstance(stored, dict) else None
    older = isinstance(version, str) and version.startswith("jaxpersona-run ")
    if version == OLDER and not overwrite:
        raise UserError(f"{folder}: run.json has the older format {OLDER!r}; choose another "
                        "folder, and copy the rollouts into it with take_from= "
                        f"(--take-from {folder})")
    if older and version not in (FORMAT, OLDER):
        raise UserError(f"{folder}: run.json has format {version!r}, but this version writes "
                        f"{FORMAT!r}; resume with the version that started the run, or choose "
                        "another folder")
    if not older:
        raise UserError(f"{folder}: run.json is not the manifest of a run; choose another folder")
    if version == FORMAT and not overwrite and sealed(stored) != stored:
        raise UserError(f"{path}: damaged (differs from the content that the run wrote); restore "
                        "the file, or choose another folder")
    return {key: value for key, value in stored.items() if key != DIGEST}


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with a digest of its content, as it is stored in run.json."""
    content = {key: value for key, value in manifest.items() if key != DIGEST}
    return {**content, DIGEST: sha256(json_text(content).encode("utf-8", "surrogatepass"))}


def roles_of(folder: pathlib.Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the role names of a manifest.

    Raises:
      UserError: a role name is not valid, or the field `roles` is not an object.
    """
    roles = manifest.get("roles", {})
    if not isinstance(roles, Mapping):
        raise UserError(f"{folder / MANIFEST}: damaged (roles is not an object); restore "
                        "the file, or choose another folder")
    check_names(roles)
    return list(roles)


def judges_of(folder: pathlib.Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the judge names of a manifest.

    Raises:
      UserError: the field `judges` is not an object with non-empty names as keys.
    """
    judges = manifest.get("judges", {})
    if not isinstance(judges, Mapping) or not all(isinstance(x, str) and x for x in judges):
        raise UserError(f"{folder / MANIFEST}: damaged (judges is not an object with "
                        "non-empty names as keys); restore the file, or choose another folder")
    return list(judges)


def shown(value: Any) -> str:
    """Format a value as JSON, truncated to 80 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


def check_same(folder: pathlib.Path, stored: Any, wanted: Mapping[str, Any]) -> None:
    """Check that two manifests belong to the same run.

    In the `GROWING` fields, only the entries that are in both manifests are compared. `LAST` is not
    compared, and `check_origin` checks `IMPORTED`. All other fields must be equal.

    Raises:
      UserError: as for `check_origin`; or a compared field differs, or the stored manifest is
        damaged.
    """
    def flat(value: Any, prefix: str = "") -> dict[str, str]:
        if not isinstance(value, dict):
            return {prefix: json.dumps(value)}  # compare text, because 1 == 1.0 == True in Python
        pairs = (flat(v, f"{prefix}.{k}" if prefix else k) for k, v in value.items())
        return {key: item for pair in pairs for key, item in pair.items()}

    check_origin(folder, stored, wanted)
    old, new = dict(stored), dict(wanted)
    old.pop(IMPORTED, None)
    new.pop(IMPORTED, None)
    for field in GROWING:
        one, two = old.get(field), new.get(field, {})
        if not isinstance(one, dict):
            raise UserError(f"{folder / MANIFEST}: damaged ({field} is not an object); "
                            "restore the file, or choose another folder")
        old[field] = {k: v for k, v in one.items() if k in two}
        new[field] = {k: v for k, v in two.items() if k in one}
    if not isinstance(old.pop(LAST, {}), dict):
        raise UserError(f"{folder / MANIFEST}: damaged ({LAST} is not an object); restore "
                        "the file, or choose another folder")
    new.pop(LAST, None)
    old, new = flat(old), flat(new)
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
