"""The files of a role that is being played: what a killed process leaves, and what others do."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxpersona.errors import UserError
from jaxpersona.runs.live import Live

SHAPE = (2, 3)


def record(i, text="hi"):
    return {"label": "pos", "prompt_index": 0, "question_index": i, "sample": 0, "question": text,
            "conversation": [{"role": "assistant", "content": text}]}


def mean(i):
    return np.full(SHAPE, i, np.float32)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "live").mkdir()
    live = Live(tmp_path, "ghost", "b", SHAPE)
    for i in range(4):
        live.add(record(i, f"a\u2028b\r\x85 {i}"), mean(i))
    live.judge("one", {"pos_p0_q0": {"score": 3}, "pos_p0_q2": {"score": None}})
    live.judge("two", {"pos_p0_q0": {"score": 1}})
    return tmp_path


def read(folder, role="ghost", binding="b", **options):
    live = Live(folder, role, binding, SHAPE, **options)
    for i, key in enumerate(live.records):
        assert key == f"pos_p0_q{i}" and (live.mean(key) == i).all()
    return len(live.records), sum(map(len, live.verdicts.values()))


def test_what_was_added_is_read(folder):
    assert read(folder) == (4, 3)
    live = Live(folder, "ghost", "b", SHAPE)
    assert live.records["pos_p0_q1"] == record(1, "a\u2028b\r\x85 1")
    assert live.verdicts == {"one": {"pos_p0_q0": {"score": 3}, "pos_p0_q2": {"score": None}},
                             "two": {"pos_p0_q0": {"score": 1}}}
    live.forget("one")
    assert read(folder) == (4, 1)
    live.keep_only({"pos_p0_q0"})
    assert read(folder) == (1, 0)
    live.add(record(1), mean(1))
    live.add(record(2), mean(2))
    live.keep_only({"pos_p0_q2"})
    for held in (live, Live(folder, "ghost", "b", SHAPE)):
        assert list(held.records) == ["pos_p0_q2"] and (held.mean("pos_p0_q2") == 2).all()
        assert held.has_mean("pos_p0_q2") and not held.has_mean("pos_p0_q1")
    live.keep_only(set())
    assert not list((folder / "live").iterdir())


@pytest.mark.parametrize("name", ["ghost.jsonl", "ghost.means", "ghost.verdicts.jsonl"])
def test_a_file_that_ends_anywhere_keeps_its_whole_entries(folder, name):
    """Cut a file anywhere: the entries before stay, and new ones follow them."""
    path = folder / "live" / name
    whole = {p.name: p.read_bytes() for p in (folder / "live").iterdir()}
    before = (0, 0)
    for size in [*range(0, len(whole[name]), 5), len(whole[name])]:
        for other, data in whole.items():
            (folder / "live" / other).write_bytes(data)
        path.write_bytes(whole[name][:size])
        left = {p.name: p.read_bytes() for p in (folder / "live").iterdir()}
        looked = read(folder, repair=False)
        assert left == {p.name: p.read_bytes() for p in (folder / "live").iterdir()}
        found = read(folder)
        assert found == looked and found >= before
        live = Live(folder, "ghost", "b", SHAPE)
        live.add(record(found[0]), mean(found[0]))
        live.judge("three", {"pos_p0_q3": {"score": 2}})
        assert read(folder) == (found[0] + 1, found[1] + 1)
        before = found
    assert before == (4, 3)


@pytest.mark.parametrize("change", [
    lambda data: data.replace(b'"score": 3', b'"score": 2'), lambda data: data + b"x\n",
    lambda data: data.replace(b"hi", b"ho"), lambda data: b"", lambda data: b"\xff" * 20])
@pytest.mark.parametrize("name", ["ghost.jsonl", "ghost.means", "ghost.verdicts.jsonl"])
def test_an_entry_that_was_changed_is_dropped_with_those_after_it(folder, name, change):
    path = folder / "live" / name
    data = change(path.read_bytes())
    path.write_bytes(data)
    read(folder)  # checks that the records have their means
    for line in (folder / "live" / "ghost.jsonl").read_bytes().splitlines()[1:] if (
            folder / "live" / "ghost.jsonl").exists() else ():
        json.loads(line[9:].decode())


@pytest.mark.parametrize(("role", "binding"), [("pirate", "b"), ("ghost", "c")])
def test_files_of_another_role_or_run_are_dropped(folder, role, binding):
    for path in list((folder / "live").iterdir()):
        path.rename(path.with_name(path.name.replace("ghost", role)))
    assert read(folder, role, binding) == (0, 0)
    assert not list((folder / "live").iterdir())


def test_a_file_that_cannot_be_used_is_named(folder):
    path = folder / "live" / "ghost.jsonl"
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"live/ghost\.jsonl: cannot be read"):
        read(folder)
