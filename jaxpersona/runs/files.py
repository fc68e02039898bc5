"""Which files a run writes, and how they are deleted: only these, by name."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

from jaxpersona.ckpts.files import leftovers
from jaxpersona.errors import UserError
from jaxpersona.runs.names import file_stem

FIGURES = tuple(f"{name}.{kind}" for name in ("roles", "pca", "variance", "drift")
                for kind in ("png", "svg"))
RESULTS = ("axis.safetensors", "analysis.json")
MANIFEST = "run.json"
PARTS = {"rollouts": ".jsonl", "means": ".safetensors", "scores": ".json",
         "vectors": ".safetensors"}


def path_of(folder: pathlib.Path, part: str, role: str) -> pathlib.Path:
    """Return the path of a role's rollouts, means, scores or vectors."""
    return folder / part / f"{file_stem(role)}{PARTS[part]}"


def delete_run(folder: pathlib.Path, roles: Iterable[str]) -> int:
    """Delete the files of a run, but for its manifest; other files in the folder stay.

    Args:
      folder: the run folder, locked by the caller.
      roles: the roles of the run's manifest.

    Returns:
      The number of deleted files.

    Raises:
      UserError: a file cannot be deleted.
    """
    remove_leftovers(folder, roles := list(roles))
    paths = [folder / name for name in (*RESULTS, *FIGURES)]
    paths += [path_of(folder, part, role) for role in roles for part in PARTS]
    return sum(delete(path) for path in paths)


def delete(path: pathlib.Path) -> bool:
    """Delete a file; return whether it existed.

    Raises:
      UserError: it cannot be deleted.
    """
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be deleted ({error.strerror or error})") from None
    return True


def remove_leftovers(folder: pathlib.Path, roles: Iterable[str]) -> None:
    """Remove a run's temporary files, left by processes killed while writing.

    The lock is held, so no process of the run is writing. Figures are drawn without the lock:
    remove their temporary files only if the process that wrote them has ended.
    """
    stems = {file_stem(role) for role in roles}
    for path, target, process in leftovers(folder):
        if target in (MANIFEST, *RESULTS) or (target in FIGURES and not _alive(process)):
            path.unlink(missing_ok=True)
    for part, suffix in PARTS.items():
        for path, target, _ in leftovers(folder / part):
            if target.endswith(suffix) and target.removesuffix(suffix) in stems:
                path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Return whether a process of this machine is running."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
