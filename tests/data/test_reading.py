"""The readers of data files: kinds of values, places of errors, and lists of entries."""

from __future__ import annotations

import json

import pytest

from jaxpersona.data import formats, reading
from jaxpersona.data.export import check_data, export, show
from jaxpersona.data.texts import Domain, Topic, User, load_drift, load_questions, load_traits
from jaxpersona.errors import UserError


@pytest.mark.parametrize(("value", "name"), [
    ({}, "an object"), ([], "a list"), ("", "a string"), (True, "a boolean"), (1, "a number"),
    (1.5, "a number"), (None, "null")])
def test_every_json_type_has_a_name(value, name):
    """With its article, for messages."""
    assert reading.kind(value) == name


@pytest.mark.parametrize(("text", "wanted"), [
    ("{", "w: invalid JSON (Expecting property name enclosed in double quotes, column 2)"),
    ('{"a": 1,\n "b": }', "w: invalid JSON (Expecting value, line 2, column 7)"),
    ('{"a": 1, "b": 2, "b": 3, "a": 4}', "w: duplicate key 'a', 'b'"),
    ("9" * 5000, "w: cannot be parsed as JSON (")])
def test_an_error_of_json_has_its_place(text, wanted):
    """The line only in a text of several lines."""
    faults = reading.Faults()
    reading.parse(text, "w", faults)
    assert len(faults) == 1 and faults[0].startswith(wanted)
    assert reading.parse("[1]", "w", faults) == [1] and len(faults) == 1


def test_several_errors_are_a_list_and_one_is_a_line():
    """A line that begins with the path does not repeat it."""
    faults = reading.Faults()
    faults.raise_if_any("folder")
    for lines, wanted in ((["a is missing"], "folder: a is missing"),
                          (["folder/b.json: x"], "folder/b.json: x"),
                          (["a", "b"], "folder: 2 errors\n  - a\n  - b")):
        with pytest.raises(UserError) as error:
            reading.Faults(lines).raise_if_any("folder")
        assert str(error.value) == wanted


def test_the_files_of_a_folder_are_sorted_and_visible(tmp_path):
    """Other suffixes and hidden files are skipped."""
    for name in ("b.json", "a.json", ".c.json", "d.txt", "e.json.bak"):
        (tmp_path / name).write_text("{}")
    faults = reading.Faults()
    assert [file.name for file in reading.folder_files(tmp_path, faults)] == ["a.json", "b.json"]
    assert not faults and reading.stem(tmp_path / "a.b.json") == "a.b"


def test_fields_of_an_object_are_checked():
    """An empty text is allowed on request; blanks are not."""
    faults = reading.Faults()
    table = {"a": "x", "b": "", "c": " ", "d": 1, "e": "\ud800", "f": [], "g": [0], "h": {}}
    assert reading.get_text(table, "a", "w", faults) == "x"
    assert reading.get_text(table, "b", "w", faults, empty=True) == "" and not faults
    assert reading.get_list(table, "g", "w", faults) == [0] and not faults
    for field in "bcdez":
        assert reading.get_text(table, field, "w", faults, prefix="p.") == ""
    assert reading.get_text(table, "c", "w", faults, empty=True) == ""
    assert reading.get_text([], "a", "w", faults, prefix="p.") == ""
    for field in ("f", "h", "z"):
        assert reading.get_list(table, field, "w", faults, prefix="q.") == []
    assert faults == [
        "w: p.b is empty", "w: p.c is empty", "w: p.d is a number, not a string",
        "w: p.e contains a lone surrogate, which is not valid UTF-8", "w: p.z is missing",
        "w: c is empty", "w: p is a list, not an object", "w: q.f is empty",
        "w: q.h is an object, not a list", "w: q.z is missing"]


@pytest.mark.parametrize(("text", "missing"), [
    ("{question} {answer}", None), ("{question}", "{answer}"), ("{answer}", "{question}"),
    ("x", "{question} and {answer}")])
def test_a_judge_s_prompt_has_both_placeholders(text, missing):
    """The text is returned either way."""
    faults = reading.Faults()
    assert reading.get_eval_prompt({"eval_prompt": text}, "w", faults) == text
    assert faults == ([] if missing is None else [f"w: eval_prompt lacks {missing}"])


def test_placeholders_without_a_value_are_kept():
    """And a template is unchanged without values."""
    assert reading.fill("{a} {b} {a}", a="1") == "1 {b} 1" and reading.fill("{a}") == "{a}"
    assert reading.fill("{a.b}{ab}", **{"a.b": "1"}) == "1{ab}"


def test_an_id_of_zero_and_a_byte_order_mark_are_read(tmp_path):
    """And blank lines count for the default ids."""
    file = tmp_path / "q.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"question": "a", "id": 0}\n \n{"question": "b"}\n')
    assert [(q.id, q.text) for q in load_questions(file)] == [(0, "a"), (2, "b")]


def test_traits_and_domains_are_sorted_by_name(tmp_path):
    """Whatever the names of their files; descriptions come from the list beside them."""
    for name, file in (("b", "1"), ("a", "2")):
        (tmp_path / f"{file}.json").write_text(json.dumps({
            "domain": name, "description": f"About {name}.", "personas": [{
                "id": f"{name}p", "card": "A user.", "topics": [
                    {"id": f"{name}t", "title": "T", "opening": "O"}]}]}))
    assert load_drift(tmp_path) == [
        Domain(name, f"About {name}.", (
            User(f"{name}p", "A user.", (Topic(f"{name}t", "T", "O"),)),)) for name in "ab"]
    folder = tmp_path / "traits"
    folder.mkdir()
    for name in ("z", "y"):
        (folder / f"{name}.json").write_text(json.dumps({
            "instruction": [{"pos": "p", "neg": "n"}], "questions": ["Q?"],
            "eval_prompt": "{question}{answer}"}))
    (tmp_path / "trait_list.json").write_text('{"y": "About y."}')
    assert [(t.name, t.description) for t in load_traits(folder)] == [("y", "About y."), ("z", "")]
    assert load_traits(folder)[0].eval_prompt == "{question}{answer}"


def test_a_list_of_entries_has_their_first_lines():
    """An entry has the number of each system prompt."""
    lines = show("question").splitlines()
    assert lines[7] == "7: What does the word home mean to you?" and len(lines) == 240
    roles = dict(line.split(": ", 1) for line in show("role").splitlines())
    pirate = show("role", "pirate").splitlines()
    assert pirate[0] == f"pirate: {roles['pirate']}"
    assert [line[:5] for line in pirate[1:]] == [f"  {i}. " for i in range(5)]
    assert show("role", "default").splitlines()[1] == "  0. (no system prompt)"
    assert [line.split(":")[0] for line in show("drift").splitlines()] == [
        "coding", "philosophy", "therapy", "writing"]
    with pytest.raises(UserError, match="trait 'zzz' is unknown; the package data contains 240$"):
        show("trait", "zzz")


def test_an_export_has_no_compiled_files(tmp_path):
    """Only data, the card and its figure."""
    export(tmp_path / "out")
    found = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {".json", ".jsonl", ".md", ".png"}
    assert not list((tmp_path / "out").rglob("__pycache__"))
    assert check_data(tmp_path / "out")[0] == "roles: 275 and the default; prompts: 1375"


def test_the_description_of_all_formats_separates_them_by_a_blank_line():
    """One format has no blank line at its end."""
    every = formats.describe()
    assert every.count("") == 2 and every[-1] and every[0] == "roles:"
    assert formats.describe("traits")[0] == "traits:" and "" not in formats.describe("traits")
    assert json.loads(formats.example("traits")[1])["questions"] == [
        "I moved house last week.", "My sister keeps bees."]
    with pytest.raises(UserError, match="kind is 'song'; it must be one of roles, questions, tra"):
        formats.describe("song")
