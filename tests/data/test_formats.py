"""`jaxpersona data format` prints files that the readers accept."""

from __future__ import annotations

import json
import pathlib

import pytest
import support as s

from jaxpersona.data import formats
from jaxpersona.data.texts import load_questions, load_roles, load_traits
from jaxpersona.errors import UserError


def printed(capsys, *kind):
    """Write the example files that the command prints; return the folder's files by kind."""
    assert s.run_command(["data", "format", *kind]) == 0
    found, path = {}, ""
    for line in capsys.readouterr().out.splitlines():
        if line.endswith(", for example:"):
            path = line.removesuffix(", for example:")
            found[path] = []
        elif not line:
            path = ""
        elif path:
            found[path].append(line)
    return {path: "\n".join(lines) for path, lines in found.items()}


def test_the_printed_examples_load(tmp_path, capsys):
    files = printed(capsys)
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    roles = {role.name: role for role in load_roles(tmp_path / "roles")}
    assert set(roles) == {"default", "pirate"} and len(roles["pirate"].prompts) == 2
    assert "{answer}" in roles["pirate"].eval_prompt
    assert [q.id for q in load_questions(tmp_path / "questions.jsonl")] == [0, 1]
    (trait,) = load_traits(tmp_path / "traits")
    assert trait.name == "curious" and len(trait.pairs) == 1 and len(trait.questions) == 2
    assert s.run_command(["data", "check", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "roles: 1 and the default; prompts: 2"


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_one_format_alone(kind, capsys):
    assert list(printed(capsys, kind)) == [formats.example(kind)[0]]


def test_every_field_of_an_example_is_explained():
    for kind in formats.FORMATS:
        lines = "\n".join(formats.describe(kind))
        first = formats.example(kind)[1].splitlines()[0] if kind == "questions" else (
            formats.example(kind)[1])
        for field in json.loads(first):
            assert f"\n  {field} " in lines, (kind, field)


def test_another_kind_is_refused(capsys):
    with pytest.raises(UserError, match="must be one of roles, questions, traits"):
        formats.example("drift")
    assert s.run_command(["data", "format", "role"]) == 2


def test_a_role_without_an_eval_prompt_loads(tmp_path):
    """Only judges that read it need it (`persona.prepare.check_texts`)."""
    (tmp_path / "ghost.json").write_text('{"instruction": [{"pos": "You are a ghost."}]}')
    assert load_roles(pathlib.Path(tmp_path))[1].eval_prompt == ""
