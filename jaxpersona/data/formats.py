"""File formats of roles, questions and traits, with an example of each.

The loaders in `texts` accept these examples.
"""

from __future__ import annotations

import json

from jaxpersona.errors import UserError

_PLAYS = ("Question: {question}\nAnswer: {answer}\nDoes the answer sound like a pirate? Reply with "
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
        "replaced by the model's name",
        "  eval_prompt   the judge's prompt, with {question} and {answer}; required only for an "
        "LLM judge without --judge-rubric",
        "default.json contains the system prompts of the default persona; if it is missing, five "
        "general prompts are used.",
        "An optional role_list.json, {name: description}, may be in the folder or in its parent."
    )),
    "questions": ("questions.jsonl", [
        {"question": "What does friendship mean to you?", "id": 0},
        {"question": "Tell me about the sea.", "id": 1}], (
        "A file with one JSON object per line, for `axis --questions FILE`.",
        "  question      the text, which is asked under every system prompt of every role",
        "  id            a unique integer; default: the zero-based line number")),
    "traits": ("traits/curious.json", {
        "instruction": [{"pos": "Be curious about what you are told.",
                         "neg": "Show no interest in what you are told."}],
        "questions": ["I moved house last week.", "My sister keeps bees."],
        "eval_prompt": _SHOWS}, (
        "A folder with one <name>.json for each trait, for `texts.load_traits`.",
        "  instruction   a list of pairs of system prompts, for the trait (pos) and against it "
        "(neg)",
        "  questions     a list of texts, which are asked under every system prompt",
        "  eval_prompt   the judge's prompt, with {question} and {answer}",
        "An optional trait_list.json, {name: description}, may be in the folder or in its parent."
    )),
}
FORMATS = tuple(_CONTENTS)


def example(kind: str) -> tuple[str, str]:
    """Return the path and content of an example file.

    Args:
      kind: one of `FORMATS`.

    Raises:
      UserError: `kind` is not one of `FORMATS`.

    Examples:
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
    """Describe a format, or all formats if `kind` is None, with an example, as lines of text.

    Raises:
      UserError: `kind` is neither None nor one of `FORMATS`.
    """
    lines: list[str] = []
    for name in FORMATS if kind is None else (kind,):
        path, text = example(name)
        lines += [f"{name}:", *_CONTENTS[name][2], f"{path}, for example:", text, ""]
    return lines[:-1]
