"""The formats of the files of roles, questions and traits, with an example of each.

The examples are files that the readers of `texts` accept.
"""

from __future__ import annotations

import json

from jaxpersona.errors import UserError

_PLAYS = ("Question: {question}\nAnswer: {answer}\nDoes the answer speak as a pirate? Reply with "
          "one number: 0 if it refuses, 1 if it helps but declines the role, 2 if it says that it "
          "is an AI but shows some of the role, 3 if it plays the role fully.")
_SHOWS = ("Question: {question}\nAnswer: {answer}\nHow curious is the answer? Reply with one "
          "number from 0 (not at all) to 100 (very).")
_CONTENTS = {
    "roles": ("roles/pirate.json", {
        "instruction": [{"pos": "You are a pirate."}, {"pos": "Take the part of a pirate."}],
        "eval_prompt": _PLAYS}, (
        "A folder with one <name>.json for each role, for `axis --roles FOLDER`.",
        "  instruction   a list of system prompts, each {\"pos\": text}; {model_name} in a text is "
        "replaced",
        "  eval_prompt   the judge's prompt, with {question} and {answer}; may be missing where "
        "the judge is none",
        "default.json holds the prompts of the model without a role; without it, five general "
        "prompts are used.",
        "role_list.json, {name: description}, may lie in the folder or beside it.")),
    "questions": ("questions.jsonl", [
        {"question": "What does friendship mean to you?", "id": 0},
        {"question": "Tell me about the sea.", "id": 1}], (
        "A file with one JSON object a line, for `axis --questions FILE`.",
        "  question      the text; every prompt of every role gets it",
        "  id            a whole number, unique; default: the number of the line, from 0")),
    "traits": ("traits/curious.json", {
        "instruction": [{"pos": "Be curious about what you are told.",
                         "neg": "Show no interest in what you are told."}],
        "questions": ["I moved house last week.", "My sister keeps bees."],
        "eval_prompt": _SHOWS}, (
        "A folder with one <name>.json for each trait, for `texts.load_traits`.",
        "  instruction   a list of pairs of system prompts, with the trait (pos) and without (neg)",
        "  questions     a list of texts, asked under every system prompt",
        "  eval_prompt   the judge's prompt, with {question} and {answer}",
        "trait_list.json, {name: description}, may lie in the folder or beside it.")),
}
FORMATS = tuple(_CONTENTS)


def example(kind: str) -> tuple[str, str]:
    """Return a file's path and content that the reader of a kind accepts.

    Args:
      kind: one of `FORMATS`.

    Raises:
      UserError: another kind.

    Example:
      >>> from jaxpersona.data.formats import example
      >>> example("questions")[0]
      'questions.jsonl'
    """
    if kind not in FORMATS:
        raise UserError(f"kind is {kind!r}; it must be one of {', '.join(FORMATS)}")
    path, value, _ = _CONTENTS[kind]
    if isinstance(value, list):
        return path, "\n".join(json.dumps(line, ensure_ascii=False) for line in value)
    return path, json.dumps(value, indent=1, ensure_ascii=False)


def describe(kind: str | None = None) -> list[str]:
    """Return the description of one format, or of all, as lines of text with an example.

    Raises:
      UserError: as `example`.
    """
    lines: list[str] = []
    for name in FORMATS if kind is None else (kind,):
        path, text = example(name)
        lines += [f"{name}:", *_CONTENTS[name][2], f"{path}, for example:", text, ""]
    return lines[:-1]
