"""Load prompt data: roles, questions, traits and opening messages of drift conversations.

By default, the package data is loaded. The files have the same layout as in the published Assistant
Axis code, so the same files work with that code and with this package. If files have errors, the
`load_*` functions raise one exception that lists all errors.
"""

from __future__ import annotations

import os
import pathlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from jaxpersona.brief import brief, count, quoted, shown
from jaxpersona.brief import line as one_line
from jaxpersona.data.reading import (
    Faults,
    fill,
    folder_files,
    get_eval_prompt,
    get_list,
    get_text,
    kind,
    parse,
    read_table,
    read_text,
    stem,
)
from jaxpersona.errors import UserError

DEFAULT = "default"

# system prompts of the default persona; "" means no system prompt
DEFAULT_PROMPTS = (
    "",
    "You are an AI assistant.",
    "You are a large language model.",
    "You are {model_name}.",
    "Respond as yourself.",
)

# names of the files with the descriptions of the roles and of the traits
ROLE_LIST, TRAIT_LIST = "role_list.json", "trait_list.json"

Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Role:
    """A persona that system prompts assign to the model.

    Attributes:
      name: the name, which is also the stem of the role's file; "default" for the default persona.
      prompts: system prompts; a run accepts "" only in the default role.
      eval_prompt: the judge's prompt with `{question}` and `{answer}`; "" if there is none, for
        example because the judge is not an LLM.
      description: one line of text, or "" if unknown.
    """

    name: str
    prompts: tuple[str, ...]
    eval_prompt: str
    description: str = ""

    def __repr__(self) -> str:
        return one_line("Role", quoted(str(self.name)), count(len(self.prompts), "prompt"),
                        "with eval_prompt" if self.eval_prompt else "no eval_prompt")

    def __post_init__(self) -> None:
        """Check the types of `prompts` and `eval_prompt`; raise UserError if one is wrong."""
        _check_texts(f"the prompts of role {self.name!r}", self.prompts)
        if not isinstance(self.eval_prompt, str):
            raise UserError(f"the eval_prompt of role {self.name!r} is "
                            f"{shown(self.eval_prompt, 60)}; it must be a string")


@dataclass(frozen=True)
class Question:
    """A question that is asked in every role; the integer `id` identifies its rollouts."""

    id: int
    text: str

    __repr__ = brief

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UserError(f"the text of question {self.id!r} is {shown(self.text, 60)}; it must "
                            "be a string")


@dataclass(frozen=True)
class Trait:
    """A trait with contrasting system prompts.

    Attributes:
      name: the name, which is also the stem of the trait's file.
      pairs: pairs of system prompts, the first for the trait and the second against it.
      questions: the questions, which are asked under every system prompt.
      eval_prompt: the judge's prompt with `{question}` and `{answer}`.
      description: one line of text, or "" if unknown.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    questions: tuple[str, ...]
    eval_prompt: str
    description: str = ""

    def __repr__(self) -> str:
        return one_line("Trait", quoted(str(self.name)), count(len(self.pairs), "pair"),
                        count(len(self.questions), "question"))

    def __post_init__(self) -> None:
        """Raise a UserError unless all questions are strings and all pairs consist of strings."""
        _check_texts(f"the questions of trait {self.name!r}", self.questions)
        for i, pair in enumerate(self.pairs):
            _check_texts(f"pair {i} of trait {self.name!r}", pair)
            if len(pair) != 2:
                raise UserError(f"pair {i} of trait {self.name!r} has length {len(pair)}; give a "
                                "positive and a negative system prompt")


@dataclass(frozen=True)
class Topic:
    """A topic of a simulated user: id, title and the user's first message."""

    id: str
    title: str
    opening: str

    __repr__ = brief


@dataclass(frozen=True)
class User:
    """A simulated user; `card` is the system prompt of the model that plays the user."""

    id: str
    card: str
    topics: tuple[Topic, ...]

    __repr__ = brief


@dataclass(frozen=True)
class Domain:
    """A category of conversations in which persona drift is measured, with its simulated users."""

    name: str
    description: str
    users: tuple[User, ...]

    __repr__ = brief


def _check_texts(what: str, texts: Any) -> None:
    """Check that `texts` is a tuple or list of strings; else raise UserError."""
    if not isinstance(texts, (tuple, list)) or not all(isinstance(x, str) for x in texts):
        raise UserError(f"{what}: the value is {shown(texts, 60)}; give a tuple of strings")


def all_of(kind: type, given: Any, name: str) -> list[Any]:
    """Convert an iterable of roles or questions to a list.

    Args:
      kind: the type of the items, `Role` or `Question`.
      given: the iterable.
      name: the name of the caller's argument, for error messages.

    Raises:
      UserError: `given` is a single item or is not iterable, or an item has the wrong type.
    """
    wanted = f"give a list of texts.{kind.__name__}"
    if isinstance(given, (str, bytes, kind)) or not isinstance(given, Iterable):
        raise UserError(f"{name} is {shown(given, 60)}; {wanted}")
    items = list(given)
    for i, item in enumerate(items):
        if not isinstance(item, kind):
            raise UserError(f"{name}[{i}] is {shown(item, 60)}; {wanted}")
    return items


def data_root() -> Traversable:
    """Return the folder of the package data."""
    return resources.files("jaxpersona.data")


def load_roles(path: Path | None = None, *, model_name: str = "the model") -> list[Role]:
    """Load roles, including the default role, sorted by name.

    Args:
      path: a folder of `<name>.json` files with {"instruction": [{"pos": …}, …], "eval_prompt":
        …}; None loads the package data. `eval_prompt` is optional, because only some judges use
        it. Without a `default.json`, the five published default prompts are used. An
        optional `role_list.json`, {name: description}, may be in the folder or its parent.
      model_name: the text that replaces `{model_name}` in prompts.

    Raises:
      UserError: `model_name` is blank, or the folder is missing or has errors; the message lists
        all errors.
    """
    if not isinstance(model_name, str) or not model_name.strip():
        raise UserError(f"model_name is {shown(model_name)}; give the text that replaces "
                        "{model_name} in prompts")
    faults = Faults()
    folder, table = _place(path, "roles", ROLE_LIST)
    described = _descriptions(table, faults)
    roles = []
    for file in folder_files(folder, faults):
        if file.name != ROLE_LIST and (raw := read_table(file, faults)) is not None:
            roles.append(_role(raw, file, described, model_name, faults))
    faults.raise_if_any(folder)
    if all(role.name != DEFAULT for role in roles):
        prompts = tuple(fill(p, model_name=model_name) for p in DEFAULT_PROMPTS)
        roles.append(Role(DEFAULT, prompts, "", described.get(DEFAULT, "")))
    return sorted(roles, key=lambda role: role.name)


def load_questions(path: Path | None = None) -> list[Question]:
    """Load questions in file order.

    Args:
      path: a JSON Lines file of objects {"question": …, "id": …}, whose default id is the
        zero-based line number; None loads the package data.

    Raises:
      UserError: the file is missing or has errors; the message lists all errors.
    """
    faults = Faults()
    file = data_root() / "questions.jsonl" if path is None else pathlib.Path(path)
    questions: list[Question] = []
    ids: list[int] = []
    # `str.splitlines` would also split at U+2028, which JSON allows inside strings
    lines = (read_text(file, faults) or "").split("\n")
    for number, line in enumerate(lines):
        where = f"{file}, line {number + 1}"
        if not line.strip():
            continue
        before = len(faults)
        raw = parse(line, where, faults)
        if not isinstance(raw, dict):
            if len(faults) == before:
                faults.append(f"{where}: contains {kind(raw)}, not an object")
            continue
        id = raw.get("id", number)
        if isinstance(id, bool) or not isinstance(id, int):
            faults.append(f"{where}: id is {kind(id)} ({id!r}), not an integer")
            id = number
        elif id < 0:
            faults.append(f"{where}: id is {id}; it must be 0 or more")
        else:
            ids.append(id)
        questions.append(Question(id, get_text(raw, "question", where, faults)))
    if not questions and not faults:
        faults.append(f"{file}: contains no question")
    for id in _twice(ids):
        faults.append(f"{file}: duplicate id {id}")
    faults.raise_if_any(file)
    return questions


def load_traits(path: Path | None = None) -> list[Trait]:
    """Load traits, sorted by name.

    Args:
      path: a folder of `<name>.json` files with {"instruction": [{"pos": …, "neg": …}, …],
        "questions": […], "eval_prompt": …}; None loads the package data. An optional
        `trait_list.json`, {name: description}, may be in the folder or its parent.

    Raises:
      UserError: the folder is missing or has errors; the message lists all errors.
    """
    faults = Faults()
    folder, table = _place(path, "traits", TRAIT_LIST)
    described = _descriptions(table, faults)
    traits = []
    for file in folder_files(folder, faults):
        if file.name != TRAIT_LIST and (raw := read_table(file, faults)) is not None:
            traits.append(_trait(raw, file, described, faults))
    faults.raise_if_any(folder)
    return sorted(traits, key=lambda trait: trait.name)


def load_drift(path: Path | None = None) -> list[Domain]:
    """Load drift domains, sorted by name.

    Args:
      path: a folder of `<domain>.json` files with {"domain": …, "description": …, "personas":
        [{"id": …, "card": …, "topics": [{"id": …, "title": …, "opening": …}, …]}, …]}; None loads
        the package data.

    Raises:
      UserError: the folder is missing or has errors; the message lists all errors.
    """
    faults = Faults()
    folder = data_root() / "drift" if path is None else pathlib.Path(path)
    domains = []
    for file in folder_files(folder, faults):
        if (raw := read_table(file, faults)) is not None:
            domains.append(_domain(raw, str(file), faults))
    users = [user for domain in domains for user in domain.users]
    for what, ids in (("domain", [domain.name for domain in domains]),
                      ("persona", [user.id for user in users]),
                      ("topic", [topic.id for user in users for topic in user.topics])):
        for id in _twice(filter(None, ids)):
            faults.append(f"{folder}: duplicate {what} {id!r}")
    faults.raise_if_any(folder)
    return sorted(domains, key=lambda domain: domain.name)


def _place(path: Path | None, part: str, table: str) -> tuple[Traversable, Traversable | None]:
    """Return a data folder and its file of descriptions, or None in place of a missing file."""
    if path is None:
        return data_root() / part, data_root() / table
    folder = pathlib.Path(path)
    for place in (folder / table, folder.parent / table):
        if place.is_file():
            return folder, place
    return folder, None


def _descriptions(file: Traversable | None, faults: Faults) -> dict[str, str]:
    raw = None if file is None else read_table(file, faults)
    return {name: get_text(raw, name, str(file), faults) for name in raw or ()}


def _role(raw: dict[str, Any], file: Traversable, described: dict[str, str], model_name: str,
          faults: Faults) -> Role:
    name, where = stem(file), str(file)
    default = name == DEFAULT
    prompts = tuple(
        fill(get_text(entry, "pos", where, faults, empty=default, prefix=f"instruction[{i}]."),
             model_name=model_name)
        for i, entry in enumerate(get_list(raw, "instruction", where, faults))
    )
    # if the judge needs an `eval_prompt`, `persona.prepare.check_texts` checks that there is one
    eval_prompt = get_eval_prompt(raw, where, faults) if "eval_prompt" in raw else ""
    return Role(name, prompts, eval_prompt, described.get(name, ""))


def _trait(raw: dict[str, Any], file: Traversable, described: dict[str, str],
           faults: Faults) -> Trait:
    name, where = stem(file), str(file)
    pairs = []
    for i, entry in enumerate(get_list(raw, "instruction", where, faults)):
        prefix = f"instruction[{i}]."
        if isinstance(entry, dict):
            pos = get_text(entry, "pos", where, faults, prefix=prefix)
            neg = get_text(entry, "neg", where, faults, prefix=prefix)
            if pos and pos == neg:
                faults.append(f"{where}: {prefix}pos and {prefix}neg are equal")
            pairs.append((pos, neg))
        else:
            faults.append(f"{where}: {prefix.rstrip('.')} is {kind(entry)}, not an object")
    questions = []
    for i, entry in enumerate(get_list(raw, "questions", where, faults)):
        field = f"questions[{i}]"
        questions.append(get_text({field: entry}, field, where, faults))
    for text in _twice(filter(None, questions)):
        faults.append(f"{where}: duplicate question {text!r}")
    return Trait(name, tuple(pairs), tuple(questions), get_eval_prompt(raw, where, faults),
                 described.get(name, ""))


def _domain(raw: dict[str, Any], where: str, faults: Faults) -> Domain:
    users = []
    for i, person in enumerate(get_list(raw, "personas", where, faults)):
        at = f"personas[{i}]"
        if not isinstance(person, dict):
            faults.append(f"{where}: {at} is {kind(person)}, not an object")
            continue
        topics = []
        for j, topic in enumerate(get_list(person, "topics", where, faults, prefix=f"{at}.")):
            inside = f"{at}.topics[{j}]"
            if not isinstance(topic, dict):
                faults.append(f"{where}: {inside} is {kind(topic)}, not an object")
                continue
            texts = (get_text(topic, key, where, faults, prefix=f"{inside}.")
                     for key in ("id", "title", "opening"))
            topics.append(Topic(*texts))
        users.append(User(get_text(person, "id", where, faults, prefix=f"{at}."),
                          get_text(person, "card", where, faults, prefix=f"{at}."),
                          tuple(topics)))
    return Domain(get_text(raw, "domain", where, faults),
                  get_text(raw, "description", where, faults), tuple(users))


def _twice(values: Iterable[Any]) -> list[Any]:
    """Return the values that occur more than once, in order of first occurrence."""
    return [value for value, n in Counter(values).items() if n > 1]
