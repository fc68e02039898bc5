"""Check, show and export the prompt data, for the commands of `jaxpersona data`."""

from __future__ import annotations

import difflib
import os
import pathlib
from collections.abc import Callable
from importlib.resources.abc import Traversable

from jaxpersona.ckpts.files import new_folder
from jaxpersona.data.texts import (
    DEFAULT,
    Path,
    data_root,
    load_drift,
    load_questions,
    load_roles,
    load_traits,
)
from jaxpersona.errors import UserError

KINDS = ("role", "question", "trait", "drift")

# the name of each part's file or folder → the function that loads the part
PARTS: dict[str, Callable[..., list]] = {
    "roles": load_roles,
    "questions.jsonl": load_questions,
    "traits": load_traits,
    "drift": load_drift,
}


def check_data(path: Path | None = None) -> list[str]:
    """Load all prompt data and return a summary with one line per part.

    Args:
      path: a folder in the layout that `export` writes, in which parts may be missing; None checks
        the package data.

    Raises:
      UserError: the folder is missing, contains none of the parts, or has errors; the message
        lists all errors.
    """
    places: dict[str, pathlib.Path | None] = dict.fromkeys(PARTS)
    if path is not None:
        folder = pathlib.Path(path)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        places = {part: folder / part for part in PARTS if (folder / part).exists()}
        if not places:
            raise UserError(f"{folder}: contains none of {', '.join(PARTS)}; give a folder with "
                            "at least one of them")
    read: dict[str, list] = {}
    faults = []
    for part, place in places.items():
        try:
            read[part] = PARTS[part](place)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))
    return [_summary(part, read[part]) if part in read else f"{part}: absent" for part in PARTS]


def _summary(part: str, texts: list) -> str:
    if part == "roles":
        roles = [role for role in texts if role.name != DEFAULT]
        prompts = sum(len(role.prompts) for role in roles)
        return f"roles: {len(roles)} and the default; prompts: {prompts}"
    if part == "questions.jsonl":
        return f"questions: {len(texts)}"
    if part == "traits":
        distinct = {text for trait in texts for text in trait.questions}
        pairs = sum(len(trait.pairs) for trait in texts)
        return f"traits: {len(texts)}; pairs: {pairs}; questions: {len(distinct)}"
    users = [user for domain in texts for user in domain.users]
    topics = sum(len(user.topics) for user in users)
    return f"drift domains: {len(texts)}; users: {len(users)}; openings: {topics}"


def show(kind: str, name: str | None = None) -> str:
    """Format one entry of the package data for display, or list the entries of a kind.

    Args:
      kind: "role", "question", "trait" or "drift".
      name: the name of a role, trait or drift domain, or the id of a question; None lists all.

    Raises:
      UserError: `kind` or `name` is unknown.
    """
    shown = _catalogue(kind)
    if name is None:
        return "\n".join(f"{key}: {first}" for key, (first, _) in shown.items())
    if name not in shown:
        near = difflib.get_close_matches(name, shown, 3)
        near += [key for key in shown if key.startswith(name[:3]) and key not in near][:5]
        count = f"{len(shown) - 1} and the default" if DEFAULT in shown else len(shown)
        raise UserError(f"{kind} {name!r} is unknown; the package data contains {count}"
                        + (f"; did you mean {' or '.join(near)}?" if near else ""))
    first, rest = shown[name]
    return "\n".join([f"{name}: {first}", *rest])


def _catalogue(kind: str) -> dict[str, tuple[str, list[str]]]:
    """Return the entries of a kind: a dict from name to (first line, further lines).

    Raises:
      UserError: the kind is unknown.
    """
    if kind == "role":
        return {role.name: (role.description, [f"  {i}. {prompt or '(no system prompt)'}"
                                               for i, prompt in enumerate(role.prompts)])
                for role in load_roles()}
    if kind == "question":
        return {str(question.id): (question.text, []) for question in load_questions()}
    if kind == "trait":
        return {trait.name: (trait.description,
                             [f"  {sign} {text}" for pair in trait.pairs
                              for sign, text in zip("+-", pair, strict=True)]
                             + [f"  ? {text}" for text in trait.questions])
                for trait in load_traits()}
    if kind == "drift":
        return {domain.name: (domain.description, [
            line for user in domain.users
            for line in (f"  {user.id}: {user.card}", *(f"    {topic.id} ({topic.title}): "
                                                      f"{topic.opening}" for topic in user.topics))
        ]) for domain in load_drift()}
    raise UserError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")


def export(folder: Path) -> int:
    """Write the package data and the data card to a folder, atomically.

    Args:
      folder: a new or empty folder, which will contain roles/, questions.jsonl, traits/, drift/,
        the other JSON files of the package data, and the data card with its figure.

    Returns:
      The number of files written.

    Raises:
      UserError: the path is a file, or the folder is not empty or not writable.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    with new_folder(folder) as temporary:
        return _copy(data_root(), temporary)


def _copy(source: Traversable, target: pathlib.Path) -> int:
    target.mkdir(exist_ok=True)
    count = 0
    for entry in source.iterdir():
        if entry.is_dir():
            count += _copy(entry, target / entry.name) if entry.name != "__pycache__" else 0
        elif entry.name.endswith((".json", ".jsonl", ".md", ".png")):
            (target / entry.name).write_bytes(entry.read_bytes())
            count += 1
    return count
