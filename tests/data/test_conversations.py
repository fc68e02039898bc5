"""Files of prompts: a line each, or JSON lines of conversations."""

from __future__ import annotations

import json

import pytest

import jaxpersona as jp
from jaxpersona.data.conversations import read_prompts

HI = {"role": "user", "content": "Hi."}
TALK = [{"role": "system", "content": "Be kind."}, HI]


def write(folder, name, *lines):
    file = folder / name
    file.write_text("\n".join(lines), "utf-8")
    return file


def test_every_line_of_a_text_is_a_message(tmp_path):
    file = write(tmp_path, "p.txt", "Hi. ", "", '{"not": "JSON"}', "a\u2028b", "")
    said = ["Hi.", '{"not": "JSON"}', "a\u2028b"]
    assert read_prompts(file) == [[{"role": "user", "content": text}] for text in said]
    system = {"role": "system", "content": "Be kind."}
    assert read_prompts(file, "Be kind.")[0] == [system, HI]


def test_json_lines_are_messages_or_conversations(tmp_path):
    more = {"messages": TALK, "model": "gpt", "temperature": 1}
    file = write(tmp_path, "p.jsonl", *map(json.dumps, ("Hi.", [HI], more)), "  ")
    assert read_prompts(file) == [[HI], [HI], TALK]


def test_all_faults_are_listed(tmp_path):
    bad = ['"Hi."', "{", "5", '{"prompt": "x"}', '[{"role": "user"}]', '" "', json.dumps(TALK),
           '[{"role": "assistant", "content": "x"}]']
    with pytest.raises(jp.UserError) as error:
        read_prompts(write(tmp_path, "p.jsonl", *bad), "Be short.")
    text = str(error.value)
    assert text.startswith(f"{tmp_path}/p.jsonl: 7 errors")
    for wanted in ("line 2: invalid JSON", "line 3: contains a number", "line 4: the object has no",
                   "line 5: message 0 has no 'content'", "line 6: the last message is blank",
                   "line 7: has a system message", "line 8: the last message has role"):
        assert wanted in text


def test_blank_lines_count_as_lines(tmp_path):
    """The numbers in messages are those of the file, also after blank lines."""
    with pytest.raises(jp.UserError) as error:
        read_prompts(write(tmp_path, "p.jsonl", "", '"Hi."', "  ", "{", "", "5"))
    assert "2 errors" in str(error.value)
    assert "line 4: invalid JSON" in str(error.value) and "line 6: contains a" in str(error.value)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_file_without_a_prompt_is_refused(tmp_path, name):
    with pytest.raises(jp.UserError, match="contains no prompt"):
        read_prompts(write(tmp_path, name, "", " "))
    with pytest.raises(jp.UserError, match="no such file"):
        read_prompts(tmp_path / f"none{name}")
