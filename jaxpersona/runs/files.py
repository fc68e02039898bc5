"""Name and delete the files that a run writes; other files are never deleted."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator

from jaxpersona.ckpts.files import leftovers
from jaxpersona.data.texts import DEFAULT
from jaxpersona.errors import UserError
from jaxpersona.runs import live
from jaxpersona.runs.names import file_stem, judge_folder

DRIFT, PAGE = "drift.json", "report.html"  # written without holding the run's lock
FIGURES = (*(f"{name}.{kind}" for name in ("roles", "pca", "variance", "drift")
             for kind in ("png", "svg")), DRIFT, PAGE)
RESULTS = ("axis.safetensors", "analysis.json")
STATUS = "status.json"
MANIFEST = "run.json"
PARTS = {"rollouts": ".jsonl", "samples": ".safetensors", "vectors": ".safetensors",
         "scores": ".json", "sums": ".safetensors"}
JUDGED = ("scores", "sums")  # parts with one subfolder per judge


def path_of(folder: pathlib.Path, part: str, role: str, judge: str = "") -> pathlib.Path:
    """Return the path of a role's rollouts, samples, vectors, scores or sums.

    Args:
      folder: the run folder.
      part: a key of `PARTS`, such as "rollouts".
      role: the name of the role.
      judge: the name of the judge, for scores and sums; ignored for the default persona, which is
        not judged.
    """
    where = folder / part
    if part in JUDGED and role != DEFAULT:
        where = where / judge_folder(judge)
    return where / f"{file_stem(role)}{PARTS[part]}"


def folders_of(folder: pathlib.Path, judges: Iterable[str]) -> Iterator[tuple[str, pathlib.Path]]:
    """Yield (part, path) for each folder that may contain files of roles, except `live`."""
    judges = list(judges)
    for part in PARTS:
        yield part, folder / part
        if part in JUDGED:
            for judge in judges:
                yield part, folder / part / judge_folder(judge)


def check_links(folder: pathlib.Path) -> None:
    """Check that no subfolder in which a run writes or deletes files is a symbolic link.

    Through such a link, files outside the run folder would be written or deleted.

    Raises:
      UserError: a folder with files of roles, or the folder of a judge, is a symbolic link.
    """
    places = [folder / name for name in (live.FOLDER, *PARTS, "means")]
    for part in JUDGED:
        if (folder / part).is_dir() and not (folder / part).is_symlink():
            # the file of the default persona is replaced as a whole, so it may be a link
            places += sorted(path for path in (folder / part).iterdir()
                             if path.is_dir() or not path.name.endswith(PARTS[part]))
    for place in places:
        if place.is_symlink():
            raise UserError(f"{place} is a symbolic link; a run keeps its files in its own "
                            "folders: replace the link with the folder itself")


def delete_run(folder: pathlib.Path, roles: Iterable[str], judges: Iterable[str]) -> int:
    """Delete the files of a run, and then its empty subfolders.

    The manifest, the lock files and all files that no run wrote are kept.

    Args:
      folder: the run folder, locked by the caller.
      roles: the names of the roles in the run's manifest.
      judges: the names of the judges in the run's manifest.

    Returns:
      The number of deleted files, not counting temporary files.

    Raises:
      UserError: a file cannot be deleted, or a folder of the run is a symbolic link.
    """
    roles, judges = list(roles), list(judges)
    check_links(folder)
    remove_leftovers(folder, roles, judges)
    count = sum(delete(folder / name) for name in (*RESULTS, *FIGURES, STATUS))
    count += sum(delete_role(folder, role, judges) for role in roles)
    for role in roles:  # files that only runs of format 2 contain
        count += sum(delete(folder / place) for place in (
            f"means/{file_stem(role)}.safetensors", f"scores/{file_stem(role)}.json"))
    # rmdir deletes a folder only if it is empty; the folders of judges come before their parents
    places = [place for _, place in folders_of(folder, judges)][::-1]
    for place in (*places, folder / live.FOLDER, folder / "means"):
        with contextlib.suppress(OSError):
            place.rmdir()
    return count


def delete_role(folder: pathlib.Path, role: str, judges: Iterable[str]) -> int:
    """Delete the files of a role and return the number of deleted files.

    Scores and sums are deleted only for the given judges.
    Raises:
      UserError: a file cannot be deleted.
    """
    paths = [folder / live.FOLDER / f"{file_stem(role)}{suffix}" for suffix in live.SUFFIXES]
    for part in ("vectors", "sums", "scores", "rollouts", "samples"):
        paths += [path_of(folder, part, role, judge)
                  for judge in (judges if part in JUDGED else ("",))]
    return sum(delete(path) for path in paths)


def delete(path: pathlib.Path) -> bool:
    """Delete a file and return whether it existed.

    Raises:
      UserError: the file cannot be deleted.
    """
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be deleted ({error.strerror or error})") from None
    return True


def remove_leftovers(folder: pathlib.Path, roles: Iterable[str], judges: Iterable[str]) -> None:
    """Remove the temporary files that killed processes of a run left behind.

    The caller holds the lock, so no other process of the run is writing. `FIGURES` are written
    without the lock, so their temporary files are removed only if the writing process has ended.
    """
    stems = {file_stem(role) for role in roles}
    for path, target, process in leftovers(folder):
        if target in (MANIFEST, STATUS, *RESULTS) or (target in FIGURES and not alive(process)):
            path.unlink(missing_ok=True)
    for part, place in folders_of(folder, judges):
        inside = place.is_dir() and not place.is_symlink() and not place.parent.is_symlink()
        for path, target, _ in leftovers(place) if inside else ():
            if target.endswith(PARTS[part]) and target.removesuffix(PARTS[part]) in stems:
                path.unlink(missing_ok=True)


def alive(process: int) -> bool:
    """Return whether a process with the id `process` is running on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
