"""Loading data folders: all errors are reported at once."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from jaxpersona.cli.data import app
from jaxpersona.data.export import check_data, export, show
from jaxpersona.data.reading import fill
from jaxpersona.data.texts import (
    Question,
    Role,
    Trait,
    all_of,
    data_root,
    load_drift,
    load_questions,
    load_roles,
    load_traits,
)
from jaxpersona.errors import UserError

EVAL = "Q {question} A {answer}"


def write(path: pathlib.Path, value: Any) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else
                     (value if isinstance(value, str) else json.dumps(value)).encode())
    return path


def role(*prompts: Any, **more: Any) -> dict[str, Any]:
    return {"instruction": [{"pos": p} for p in prompts], "eval_prompt": EVAL} | more


def trait(**more: Any) -> dict[str, Any]:
    return {"instruction": [{"pos": "Be so.", "neg": "Be otherwise."}], "questions": ["Why?"],
            "eval_prompt": EVAL} | more


def domain(name: str = "coding", **more: Any) -> dict[str, Any]:
    topics = [{"id": f"{name}_t", "title": "A title", "opening": "Hello."}]
    return {"domain": name, "description": "About it.",
            "personas": [{"id": f"{name}_p", "card": "A user.", "topics": topics}]} | more


def faults(load: Callable[[Any], Any], path: Any) -> list[str]:
    with pytest.raises(ValueError) as caught:
        load(path)
    head, *lines = str(caught.value).splitlines()
    if not lines:  # a single fault is one line
        return [head]
    assert len(lines) > 1 and head.endswith(f"{len(lines)} errors")
    return lines


def test_a_reference_folder_of_roles(tmp_path):
    prompts = ("You are a pirate.", "Arr, {model_name}.")
    write(tmp_path / "pirate.json", role(*prompts, questions=["unused"]))
    write(tmp_path / "bard.json", "\ufeff" + json.dumps(role("Sing: {not_ours}, naïve Zoë.")))
    write(tmp_path / "default.json", {"instruction": [{"pos": ""}, {"pos": "I am {model_name}."}]})
    write(tmp_path / "role_list.json", {"pirate": "A sailor."})
    write(tmp_path / ".hidden.json", "not JSON")
    bard, default, pirate = load_roles(tmp_path, model_name="Qwen {3}")
    assert bard.prompts == ("Sing: {not_ours}, naïve Zoë.",) and bard.description == ""
    assert default.prompts == ("", "I am Qwen {3}.") and default.eval_prompt == ""
    assert pirate.prompts[1] == "Arr, Qwen {3}." and pirate.description == "A sailor."
    assert pirate.eval_prompt == EVAL


def test_a_folder_without_default_gets_ours(tmp_path):
    write(tmp_path / "pirate.json", role("You are a pirate."))
    default, pirate = load_roles(tmp_path, model_name="Mini")
    assert default.prompts == ("", "You are an AI assistant.", "You are a large language model.",
                               "You are Mini.", "Respond as yourself.")
    assert default.prompts == load_roles(model_name="Mini")[
        [r.name for r in load_roles()].index("default")].prompts


ROLE_FAULTS = {
    "text": ("{", "invalid JSON"),
    "list": ([], "contains a list, not an object"),
    "utf8": (b'{"a": "\xff"}', "invalid UTF-8 at byte 7"),
    "key": ('{"instruction": [{"pos": "a"}], "eval_prompt": "{question}{answer}", '
            '"eval_prompt": "{question}{answer}"}', "duplicate key 'eval_prompt'"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "missing": ({"eval_prompt": EVAL}, "instruction is missing"),
    "unlisted": (role() | {"instruction": "You are."}, "instruction is a string, not a list"),
    "none": (role(), "instruction is empty"),
    "string": (role() | {"instruction": ["a"]}, "instruction[0] is a string, not an object"),
    "nopos": (role() | {"instruction": [{"neg": "a"}]}, "instruction[0].pos is missing"),
    "number": (role("a", 3), "instruction[1].pos is a number, not a string"),
    "boolean": (role(True), "instruction[0].pos is a boolean, not a string"),
    "empty": (role("a", ""), "instruction[1].pos is empty"),
    "blank": (role(" \n"), "instruction[0].pos is empty"),
    "surrogate": ('{"instruction": [{"pos": "\\ud800"}], "eval_prompt": "{question}{answer}"}',
                  "a lone surrogate"),
    "noplace": (role("a", eval_prompt="Rate it."), "eval_prompt lacks {question} and {answer}"),
    "default": ({"instruction": [{"pos": " "}]}, "instruction[0].pos is empty"),
}


@pytest.mark.parametrize("name", ROLE_FAULTS)
def test_each_fault_of_a_role(tmp_path, name):
    content, wanted = ROLE_FAULTS[name]
    file = write(tmp_path / f"{name}.json", content)
    (line,) = faults(load_roles, tmp_path)
    assert str(file) in line and wanted in line


def test_all_faults_of_a_folder_at_once(tmp_path):
    for name, (content, _) in ROLE_FAULTS.items():
        write(tmp_path / f"{name}.json", content)
    write(tmp_path / "two.json", role("", 3, eval_prompt=""))
    lines = faults(load_roles, tmp_path)
    assert len(lines) == len(ROLE_FAULTS) + 3
    for name, (_, wanted) in ROLE_FAULTS.items():
        assert any(f"/{name}.json" in line and wanted in line for line in lines)


@pytest.mark.parametrize("load", [load_roles, load_traits, load_drift])
def test_missing_and_empty_folders(tmp_path, load):
    assert "no such folder" in faults(load, tmp_path / "nowhere")[0]
    assert "contains no .json file" in faults(load, tmp_path)[0]


def test_bad_descriptions_and_model_name(tmp_path):
    write(tmp_path / "a.json", role("a"))
    write(tmp_path / "role_list.json", {"a": 3})
    assert "role_list.json: a is a number" in faults(load_roles, tmp_path)[0]
    for wrong in (" ", None, 3):
        with pytest.raises(ValueError, match=f"model_name is {wrong!r}; give the text"):
            load_roles(model_name=wrong)


def test_descriptions_in_the_folder_come_before_those_beside_it(tmp_path):
    folder = tmp_path / "roles"
    write(folder / "pirate.json", role("You are a pirate."))
    write(tmp_path / "role_list.json", {"pirate": "Beside."})
    assert load_roles(folder)[1].description == "Beside."
    write(folder / "role_list.json", {"pirate": "Within."})
    assert load_roles(folder)[1].description == "Within."


def test_questions_with_and_without_ids(tmp_path):
    file = write(tmp_path / "q.jsonl", '{"question": "One?"}\n\n{"question": "Two\u2028?"}\r\n'
                                       '{"question": "Three?", "id": 17}')
    assert load_questions(file) == [Question(0, "One?"), Question(2, "Two\u2028?"),
                                    Question(17, "Three?")]


def test_all_faults_of_questions_at_once(tmp_path):
    lines = ['{"question": "a", "id": 1}', '{"question": "b"}', "{", "[]", '{"id": 9}',
             '{"question": ""}', '{"question": "c", "id": "x"}', '{"question": "d", "id": true}',
             '{"question": "e", "id": -1}', '{"question": 4, "id": 99}']
    file = write(tmp_path / "q.jsonl", "\n".join(lines))
    found = faults(load_questions, file)
    for line, wanted in ((3, "invalid JSON"), (4, "contains a list"), (5, "question is missing"),
                         (6, "question is empty"), (7, "id is a string ('x')"),
                         (8, "id is a boolean"), (9, "id is -1"), (10, "question is a number")):
        assert any(f"line {line}:" in fault and wanted in fault for fault in found), wanted
    assert any("duplicate id 1" in fault for fault in found)
    assert len(found) == 9


def test_questions_that_cannot_be_read(tmp_path):
    assert "no such file" in faults(load_questions, tmp_path / "none.jsonl")[0]
    assert "invalid UTF-8" in faults(load_questions, write(tmp_path / "b", b"\xff\n"))[0]
    assert "contains no question" in faults(load_questions, write(tmp_path / "e", "\n\n"))[0]
    assert "cannot be read" in faults(load_questions, tmp_path)[0]


def test_traits(tmp_path):
    write(tmp_path / "evil.json", trait())
    (evil,) = load_traits(tmp_path)
    assert evil.pairs == (("Be so.", "Be otherwise."),) and evil.questions == ("Why?",)
    write(tmp_path / "a.json", trait(instruction=[{"pos": "x", "neg": "x"}, {"pos": ""}, 3]))
    write(tmp_path / "b.json", trait(questions=["Why?", 4, "Why?", ""], eval_prompt="{question}"))
    write(tmp_path / "c.json", {})
    found = faults(load_traits, tmp_path)
    for name, wanted in (("a", "instruction[0].pos and instruction[0].neg are equal"),
                         ("a", "instruction[1].pos is empty"),
                         ("a", "instruction[1].neg is missing"),
                         ("a", "instruction[2] is a number"), ("b", "questions[1] is a number"),
                         ("b", "questions[3] is empty"), ("b", "duplicate question 'Why?'"),
                         ("b", "eval_prompt lacks {answer}"), ("c", "instruction is missing"),
                         ("c", "questions is missing"), ("c", "eval_prompt is missing")):
        assert any(f"/{name}.json" in fault and wanted in fault for fault in found), wanted
    assert len(found) == 11


def test_drift(tmp_path):
    write(tmp_path / "coding.json", domain())
    (coding,) = load_drift(tmp_path)
    assert coding.users[0].topics[0].opening == "Hello."
    write(tmp_path / "again.json", domain())
    write(tmp_path / "bad.json", {"domain": "", "personas": [3, {"topics": [4, {"id": "x"}]}]})
    found = faults(load_drift, tmp_path)
    for wanted in ("domain is empty", "description is missing", "personas[0] is a number",
                   "personas[1].id is missing", "personas[1].card is missing",
                   "personas[1].topics[0] is a number", "personas[1].topics[1].title is missing",
                   "personas[1].topics[1].opening is missing", "duplicate domain 'coding'",
                   "duplicate persona 'coding_p'", "duplicate topic 'coding_t'"):
        assert any(wanted in fault for fault in found), wanted
    assert len(found) == 11


def test_fill_is_one_pass():
    assert fill("{question}|{answer}|{x}", question="{answer}", answer="42") == "{answer}|42|{x}"


def test_export_is_read_back_and_checked(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    assert export(folder) == sum(path.is_file() for path in folder.rglob("*")) > 500
    assert (folder / "DATA_CARD.md").read_bytes() == (data_root() / "DATA_CARD.md").read_bytes()
    assert list(folder.glob("*.png"))
    assert load_roles(folder / "roles") == load_roles()
    assert load_questions(folder / "questions.jsonl") == load_questions()
    assert load_traits(folder / "traits") == load_traits()
    assert load_drift(folder / "drift") == load_drift()
    assert check_data(folder) == check_data()
    assert [p.name for p in tmp_path.iterdir()] == ["texts"]
    (folder / "roles" / "pirate.json").write_text("{")
    (folder / "questions.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"(?s)pirate\.json.*questions\.jsonl"):
        check_data(folder)


def test_export_refuses(tmp_path):
    write(tmp_path / "full" / "x", "kept")
    with pytest.raises(ValueError, match="not empty"):
        export(tmp_path / "full")
    with pytest.raises(ValueError, match="is a file"):
        export(tmp_path / "full" / "x")
    with pytest.raises(ValueError, match="cannot be written"):
        export(tmp_path / "full" / "x" / "y")
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "x"]


def test_check_refuses(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        check_data(tmp_path / "none")
    with pytest.raises(ValueError, match="contains none of"):
        check_data(tmp_path)
    write(tmp_path / "questions.jsonl", '{"question": "Why?"}')
    assert check_data(tmp_path) == ["roles: absent", "questions: 1", "traits: absent",
                                    "drift: absent"]


def test_the_summary_counts_each_part(tmp_path):
    write(tmp_path / "roles" / "ghost.json", role("a", "b"))
    write(tmp_path / "roles" / "default.json", role("", "c", "d"))
    pairs = [{"pos": f"Be {i}.", "neg": f"Not {i}."} for i in range(3)]
    write(tmp_path / "traits" / "a.json", trait(questions=["Why?", "How?"]))
    write(tmp_path / "traits" / "b.json", trait(instruction=pairs, questions=["Why?", "Who?"]))
    users = [{"id": f"u{i}", "card": "A user.", "topics": [
        {"id": f"t{i}{j}", "title": "T", "opening": "Hi."} for j in range(i + 1)]}
        for i in range(2)]
    write(tmp_path / "drift" / "coding.json", domain(personas=users))
    assert check_data(tmp_path) == [
        "roles: 1 and the default; prompts: 2", "questions.jsonl: absent",
        "traits: 2; pairs: 4; questions: 3", "drift domains: 1; users: 2; openings: 3"]


def test_texts_of_the_wrong_kind_are_refused():
    for call, wanted in ((lambda: Role("a", ("x", 3), ""), "the prompts of role 'a': the value is"),
                         (lambda: Role("a", ("x",), None), "the eval_prompt of role 'a' is None"),
                         (lambda: Question(1, 5), "the text of question 1 is 5"),
                         (lambda: Trait("t", (), ("x", None), ""), "the questions of trait 't'"),
                         (lambda: Trait("t", (("x", 1),), (), ""), "pair 0 of trait 't': the val"),
                         (lambda: Trait("t", (("x", "y"), ("x",)), (), ""), "pair 1 .* length 1"),
                         (lambda: all_of(Question, "x", "questions"), "questions is 'x'; give a l"),
                         (lambda: all_of(Question, Question(0, "x"), "questions"), "is Question"),
                         (lambda: all_of(Question, [Question(0, "x"), {}], "questions"),
                          r"questions\[1\] is {}; give a list of texts.Question")):
        with pytest.raises(UserError, match=wanted):
            call()


def test_only_the_default_role_may_have_no_system_prompt():
    from jaxpersona.persona.prepare import check_texts
    from jaxpersona.runs.rollouts import Settings

    def check(default, ghost):
        roles = [Role("default", default, ""), Role("ghost", ghost, ""), Role("bard", ("b",), "")]
        return check_texts(roles, [Question(0, "Why?")], Settings(), min_count=1, held_out=[],
                           judge=None)[0]

    assert check(("", "You are Mini."), ("a",))[0].prompts[0] == ""
    for given, wanted in (((("",), ("a", "")), "prompt 1 of role 'ghost' is blank"),
                          ((("",), (" \n",)), "prompt 0 of role 'ghost' is blank"),
                          ((("a", " "), ("a",)), "prompt 1 of role 'default' is blank")):
        with pytest.raises(UserError, match=wanted):
            check(*given)


def test_show_marks_the_sides_of_a_trait_and_the_openings_of_a_user():
    raw = json.loads((data_root() / "traits" / "callous.json").read_text("utf-8"))
    lines = show("trait", "callous").splitlines()
    first = raw["instruction"][0]
    assert lines[1:3] == [f"  + {first['pos']}", f"  - {first['neg']}"]
    assert lines[-1] == f"  ? {raw['questions'][-1]}"
    raw = json.loads((data_root() / "drift" / "coding.json").read_text("utf-8"))
    user = raw["personas"][0]
    topic = user["topics"][0]
    assert show("drift", "coding").splitlines()[1:3] == [
        f"  {user['id']}: {user['card']}",
        f"    {topic['id']} ({topic['title']}): {topic['opening']}"]


def test_show():
    assert "peg" not in show("role", "pirate") and "4. " in show("role", "pirate")
    assert "(no system prompt)" in show("role", "default")
    assert show("question", "7") == "7: What does the word home mean to you?"
    assert len(show("trait").splitlines()) == 240 and "  - " in show("trait", "callous")
    assert "night_shift_backend" in show("drift", "coding")
    with pytest.raises(ValueError, match="275 and the default; did you mean .*pirate"):
        show("role", "pirates")
    with pytest.raises(ValueError, match="role 'gost' is unknown.*did you mean ghost"):
        show("role", "gost")
    with pytest.raises(ValueError, match="'999' is unknown; the package data contains 240"):
        show("question", "999")
    with pytest.raises(ValueError, match="kind is 'song'"):
        show("song")


def test_commands(tmp_path):
    runner = CliRunner()
    assert isinstance(app, typer.Typer)
    assert "275 and the default" in runner.invoke(app, ["check"]).stdout
    assert "pirate" in runner.invoke(app, ["show", "role", "pirate"]).stdout
    assert "files to" in runner.invoke(app, ["export", str(tmp_path / "out")]).stdout
    # the command prints the error, so nothing is raised
    assert isinstance(runner.invoke(app, ["check", str(tmp_path / "no")]).exception, ValueError)


def test_reading_loads_no_heavy_library():
    code = ("import sys; from jaxpersona.data.texts import load_roles; load_roles(); "
            "print(*({'torch', 'transformers', 'matplotlib', 'scipy'} & {*sys.modules}))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
