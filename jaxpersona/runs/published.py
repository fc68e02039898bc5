"""The file formats of the published Assistant Axis code (Lu et al. 2026), and readers of the files.

    responses/<role>.jsonl   one rollout per line, with the fields `FIELDS`
    scores/<role>.json       key → score from 0 to 3; a rollout without a score was not judged
    activations/<role>.pt    key → response mean [L, D] of a rollout
    vectors/<role>.pt        {"vector": [L, D], "type": "pos_3" or "mean", "role": <role>}
    axis.pt                  {"axis", "default_mean", "role_mean": [L, D]; "n_default", "n_roles"}

A key is `<label>_p<prompt_index>_q<question_index>`. The published code labels every rollout "pos".
A run folder of this package labels the rollouts of the default persona "default", so the functions
below convert the keys. Only the first three kinds of files are read here. The readers append errors
to a list, so that one message reports them all.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.ckpts.torchmeans import read_means
from jaxpersona.data.reading import Faults, kind, parse, read_table, read_text
from jaxpersona.data.texts import DEFAULT
from jaxpersona.errors import UserError
from jaxpersona.judges.protocol import ROLE_SCALE
from jaxpersona.runs.rollouts import rollout_key

RESPONSES, SCORES, ACTIVATIONS, VECTORS = "responses", "scores", "activations", "vectors"
SAMPLE = "activations_sample"  # a sample of the response means; the published code does not read it
AXIS = "axis.pt"
SUFFIXES = {RESPONSES: ".jsonl", SCORES: ".json", ACTIVATIONS: ".pt"}
FIELDS = ("system_prompt", "prompt_index", "question_index", "question", "conversation", "label")
LABEL = "pos"
MAX_INDEX = 1_000_000  # exclusive upper bound of prompt and question indices
_SHOWN = 5  # maximum number of keys that a message lists
_LONGEST = 200  # maximum bytes of a role name; file systems allow 255, and suffixes need the rest


@dataclasses.dataclass
class Texts:
    """The rollouts of one role in a published folder.

    Attributes:
      records: key in a run folder (`rollout_key`) → rollout.
      names: key in the published folder → key in a run folder.
      extra: unknown field (not in `FIELDS`) → number of rollouts that have it.
    """

    __repr__ = brief

    records: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    extra: Counter[str] = dataclasses.field(default_factory=Counter)

    def prompts(self) -> dict[int, str]:
        """Return a dict from prompt index to system prompt, sorted by index."""
        found = {r["prompt_index"]: r["system_prompt"] for r in self.records.values()}
        return dict(sorted(found.items()))

    def questions(self) -> dict[int, str]:
        """Return a dict from question index to question, sorted by index."""
        found = {r["question_index"]: r["question"] for r in self.records.values()}
        return dict(sorted(found.items()))


def published_key(record: Mapping[str, Any]) -> str:
    """Return the key of a rollout in a published folder."""
    return f"{LABEL}_p{record['prompt_index']}_q{record['question_index']}"


def published_record(record: Mapping[str, Any], *, fold_system: bool = False) -> dict[str, Any]:
    """Convert a rollout to the published format, with the fields in the order of `FIELDS`.

    Args:
      record: a rollout of a run folder.
      fold_system: whether to prepend the system prompt to the user's message, separated by a blank
        line, as the published code does for models whose template has no system role.
    """
    talk = [dict(message) for message in record["conversation"]]
    if fold_system and talk[0]["role"] == "system":
        system, user, *rest = talk
        talk = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
    return {field: record[field] for field in FIELDS} | {"conversation": talk, "label": LABEL}


def check_role(role: str) -> None:
    """Check that a role's name can be used as a file name without escaping.

    Raises:
      UserError: the name is empty, too long or not valid UTF-8, begins with a dot, or contains a
        path separator, a colon or a non-printable character.
    """
    plain = role.isprintable() and not role.startswith(".") and not set(role) & set("/\\:")
    if not role or not plain or len(role.encode("utf-8", "replace")) > _LONGEST:
        raise UserError(f"the role name {role[:40]!r} cannot be used as a file name in the "
                        "published format; use a shorter name, or one without a leading dot, path "
                        "separators, colons or non-printable characters")


def roles_in(folder: pathlib.Path, part: str) -> list[str]:
    """Return the sorted names of the roles that have a file in a subfolder.

    The list is empty if the subfolder does not exist.

    Args:
      folder: the published folder.
      part: the name of the subfolder: `RESPONSES`, `SCORES` or `ACTIVATIONS`.

    Raises:
      UserError: a role name is not valid (`check_role`).
    """
    place, suffix = folder / part, SUFFIXES[part]
    if not place.is_dir():
        return []
    # skip hidden files, which editors and operating systems create
    names = sorted(p.name.removesuffix(suffix) for p in place.iterdir()
                   if p.name.endswith(suffix) and not p.name.startswith("."))
    for name in names:
        check_role(name)
    return names


def read_responses(folder: pathlib.Path, role: str, faults: Faults) -> Texts:
    """Read and check the rollouts of a role; append the errors, with line numbers, to `faults`."""
    path, found = folder / RESPONSES / f"{role}.jsonl", Texts()
    prompts: dict[int, str] = {}
    questions: dict[int, str] = {}
    before = len(faults)
    # `str.splitlines` would also split at U+2028, which JSON allows inside strings
    for number, line in enumerate((read_text(path, faults) or "").split("\n"), 1):
        if not line.strip():
            continue
        where, known = f"{path}, line {number}", len(faults)
        raw = parse(line, where, faults)
        record = _record(raw, role, where, faults) if len(faults) == known else None
        if record is None:
            continue
        key = rollout_key(record)
        if key in found.records:
            faults.append(f"{where}: a rollout of prompt {record['prompt_index']} and question "
                          f"{record['question_index']} is on an earlier line")
        for index, text, seen in (("prompt_index", "system_prompt", prompts),
                                  ("question_index", "question", questions)):
            if seen.setdefault(record[index], record[text]) != record[text]:
                faults.append(f"{where}: {text} differs from the {text} of an earlier line with "
                              f"{index} {record[index]}")
        found.records[key] = record
        found.names[f"{raw['label']}_p{raw['prompt_index']}_q{raw['question_index']}"] = key
        found.extra.update(set(raw) - set(FIELDS))
    if not found.records and len(faults) == before:
        faults.append(f"{path}: contains no rollouts")
    return found


def read_scores(folder: pathlib.Path, role: str, texts: Texts, faults: Faults) -> dict[str, int]:
    """Read and check the scores of a role; return a dict from `rollout_key` to score."""
    path = folder / SCORES / f"{role}.json"
    raw = read_table(path, faults) or {}
    _unknown(path, raw, texts, faults)
    found = {}
    for key, score in raw.items():
        if type(score) is not int or score not in ROLE_SCALE:
            faults.append(f"{path}: the score of {key!r:.60} is {score!r:.40}; it must be an "
                          f"integer from {ROLE_SCALE[0]} to {ROLE_SCALE[-1]}")
        elif key in texts.names:
            found[texts.names[key]] = score
    return found


def read_activations(folder: pathlib.Path, role: str, texts: Texts, shape: tuple[int, ...] | None,
                     faults: Faults) -> dict[str, np.ndarray]:
    """Read and check a role's response means; return a dict from `rollout_key` to mean [L, D].

    Args:
      folder: the published folder.
      role: the name of the role.
      texts: the rollouts of the role.
      shape: (L, D); None if unknown, in which case all means must have the shape of the first.
      faults: the list to which error messages are appended.
    """
    path = folder / ACTIVATIONS / f"{role}.pt"
    try:
        held = read_means(path)
    except UserError as error:
        faults.append(str(error))
        return {}
    _unknown(path, held, texts, faults)
    first = next(iter(held.values())).shape if held else ()
    shape = shape if shape is not None else first
    wrong = [key for key, mean in held.items()
             if mean.ndim != 2 or not mean.size or mean.shape != shape]
    if wrong:
        faults.append(f"{path}: tensors of another shape than "
                      f"{list(shape) if len(shape) == 2 else '[layers, width]'}: {_some(wrong)}; "
                      f"the first of them has {list(held[wrong[0]].shape)}")
    broken = [key for key, mean in held.items() if not np.isfinite(mean).all()]
    if broken:
        faults.append(f"{path}: tensors with non-finite values: {_some(broken)}")
    return {texts.names[key]: mean for key, mean in held.items() if key in texts.names}


def _unknown(path: pathlib.Path, keys: Iterable[str], texts: Texts, faults: Faults) -> None:
    """Append an error to `faults` if there are keys without a rollout."""
    if more := [key for key in keys if key not in texts.names]:
        faults.append(f"{path}: keys without a rollout in {RESPONSES}: {_some(more)}")


def _some(keys: list[str]) -> str:
    """Join the first `_SHOWN` keys with commas; append the total number if there are more."""
    named = ", ".join(f"{key:.60}" for key in keys[:_SHOWN])
    return named + (f", … ({len(keys)} in total)" if len(keys) > _SHOWN else "")


def _record(raw: Any, role: str, where: str, faults: Faults) -> dict[str, Any] | None:
    """Convert a parsed line to a rollout of a run folder; return None if the line has errors."""
    before = len(faults)
    if not isinstance(raw, dict):
        faults.append(f"{where}: contains {kind(raw)}, not an object")
        return None
    for field in FIELDS:
        if field not in raw:
            faults.append(f"{where}: {field} is missing")
    for field in ("system_prompt", "question"):
        if not isinstance(raw.get(field, ""), str):
            faults.append(f"{where}: {field} is {kind(raw[field])}, not a string")
    for field in ("prompt_index", "question_index"):
        value = raw.get(field, 0)
        if type(value) is not int or not 0 <= value < MAX_INDEX:
            faults.append(f"{where}: {field} is {value!r:.40}; it must be an integer from 0 to "
                          f"{MAX_INDEX - 1:,}")
    labels = (LABEL, DEFAULT) if role == DEFAULT else (LABEL,)
    if raw.get("label", LABEL) not in labels:
        faults.append(f"{where}: label is {raw['label']!r:.40}; it must be {' or '.join(labels)}")
    if "conversation" in raw and (fault := _fault_of(raw["conversation"])):
        faults.append(f"{where}: conversation {fault}")
    if len(faults) > before:
        return None
    record = {field: raw[field] for field in FIELDS}
    return record | {"label": DEFAULT if role == DEFAULT else LABEL, "sample": 0}


def _fault_of(talk: Any) -> str:
    """Describe the first error in a conversation; return "" if there is none."""
    if not isinstance(talk, list) or not all(
            isinstance(m, dict) and set(m) == {"role", "content"}
            and all(isinstance(x, str) for x in m.values()) for m in talk):
        return "is not a list of messages with the string fields role and content"
    roles = [message["role"] for message in talk]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        return (f"has messages of the roles {', '.join(roles)[:60] or 'none'}; it must have one "
                "user message and one reply, after an optional system message")
    return ""
