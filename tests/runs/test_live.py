"""The files of a role that is being played: what a killed process leaves, and what others do."""

from __future__ import annotations

import json
import os
import zlib

import numpy as np
import pytest

from jaxpersona.errors import UserError
from jaxpersona.runs.live import Live

SHAPE = (2, 3)
NAMES = ("ghost.jsonl", "ghost.means", "ghost.verdicts.jsonl")


def record(i, text="hi"):
    return {"label": "pos", "prompt_index": 0, "question_index": i, "sample": 0, "question": text,
            "system_prompt": "", "conversation": [{"role": "assistant", "content": text}]}


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


@pytest.mark.parametrize("name", NAMES)
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


def edit(old, new):
    def act(data):
        assert data.count(old) == 1 and len(old) == len(new)
        return data.replace(old, new)
    return act


@pytest.mark.parametrize(("name", "change", "replies", "verdicts"), [
    ("ghost.jsonl", edit(b' 2", "role"', b' 5", "role"'), 2, 3),
    ("ghost.jsonl", edit(b' 0", "role"', b' 5", "role"'), 0, 3),
    ("ghost.jsonl", edit(b'"binding": "b"', b'"binding": "c"'), 0, 3),
    ("ghost.jsonl", lambda data: data + b"x\n", 4, 3),
    ("ghost.jsonl", lambda data: b"", 0, 3),
    ("ghost.jsonl", lambda data: b"\xff" * 20, 0, 3),
    ("ghost.means", lambda data: data[:53] + b"\1" + data[54:], 2, 3),  # each has 24 bytes
    ("ghost.means", lambda data: data[24:48] + data[:24] + data[48:], 0, 3),
    ("ghost.means", lambda data: data + b"x\n", 4, 3),
    ("ghost.means", lambda data: b"", 0, 3),
    ("ghost.verdicts.jsonl", edit(b'"score": 3', b'"score": 2'), 4, 0),
    ("ghost.verdicts.jsonl", edit(b"null", b"   2"), 4, 1),
    ("ghost.verdicts.jsonl", edit(b'"score": 1', b'"score": 0'), 4, 2),
    ("ghost.verdicts.jsonl", edit(b'"binding": "b"', b'"binding": "c"'), 4, 0),
    ("ghost.verdicts.jsonl", lambda data: data + b"x\n", 4, 3),
    ("ghost.verdicts.jsonl", lambda data: b"", 4, 0)])
def test_an_entry_that_was_changed_is_dropped_with_those_after_it(
        folder, name, change, replies, verdicts):
    whole = {p.name: p.read_bytes() for p in (folder / "live").iterdir()}
    (folder / "live" / name).write_bytes(change(whole[name]))
    assert read(folder, repair=False) == read(folder) == (replies, verdicts)
    left = Live(folder, "ghost", "b", SHAPE)
    assert list(left.records.values()) == [
        record(i, f"a\u2028b\r\x85 {i}") for i in range(replies)]
    assert [(judge, key, verdict) for judge, found in left.verdicts.items()
            for key, verdict in found.items()] == [
        ("one", "pos_p0_q0", {"score": 3}), ("one", "pos_p0_q2", {"score": None}),
        ("two", "pos_p0_q0", {"score": 1})][:verdicts]
    for path in (folder / "live").iterdir():  # the files end with their last valid entries
        assert whole[path.name].startswith(path.read_bytes())


@pytest.mark.parametrize("text", [
    b"[]", b"[" * 5000, b"9" * 5000, b"{}",
    json.dumps(record(1) | {"label": "neg"}).encode(),
    json.dumps(record(1) | {"prompt_index": True}).encode(),
    json.dumps(record(1) | {"question_index": 10**400}).encode(),
    json.dumps(record(1) | {"conversation": [{"role": "user", "content": "hi"}]}).encode(),
    json.dumps(record(1) | {"reply_ids": [-1]}).encode()])
def test_a_line_with_a_checksum_and_no_rollout_is_dropped(folder, text):
    path = folder / "live" / "ghost.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[3] = b"%08x %s" % (zlib.crc32(mean(2).tobytes(), zlib.crc32(text)), text)
    path.write_bytes(b"\n".join(lines))
    assert read(folder, repair=False) == read(folder) == (2, 3)


@pytest.mark.parametrize("value", [
    [], {}, {"judge": "one", "key": "k"}, {"judge": [], "key": "k", "verdict": {"score": 1}},
    {"judge": "one", "key": [1], "verdict": {"score": 1}},
    *({"judge": "one", "key": "k", "verdict": verdict} for verdict in (
        [1], {}, {"score": "3"}, {"score": True}, {"score": 2**63}, {"score": 1, "raw": None},
        {"score": 1, "refused": 0}, {"score": 1, "mass": "x"}, {"score": None, "error": 5},
        {"score": 1, "expected": 10**400}))])
def test_a_line_with_a_checksum_and_no_verdict_is_dropped(folder, value):
    path, text = folder / "live" / "ghost.verdicts.jsonl", json.dumps(value).encode()
    lines = path.read_bytes().split(b"\n")
    lines[2] = b"%08x %s" % (zlib.crc32(text), text)
    path.write_bytes(b"\n".join(lines))
    assert read(folder, repair=False) == read(folder) == (4, 1)


@pytest.mark.parametrize(("role", "binding"), [("pirate", "b"), ("ghost", "c")])
def test_files_of_another_role_or_run_are_dropped(folder, role, binding):
    for path in list((folder / "live").iterdir()):
        path.rename(path.with_name(path.name.replace("ghost", role)))
    assert read(folder, role, binding) == (0, 0)
    assert not list((folder / "live").iterdir())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("make", "kind"), [
    (lambda path: path.mkdir(), "a folder"), (os.mkfifo, "a pipe")], ids=["a folder", "a pipe"])
def test_a_file_that_cannot_be_used_is_named(folder, name, make, kind):
    path = folder / "live" / name
    path.unlink()
    make(path)
    for repair in (False, True):
        with pytest.raises(UserError, match=rf"live/{name}: cannot be read \(it is {kind}"):
            read(folder, repair=repair)
    assert path.exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["another file", "nothing"])
def test_the_target_of_a_link_is_neither_changed_nor_created(tmp_path, name, target):
    (tmp_path / "live").mkdir()
    mine = tmp_path / "mine.txt"
    if target == "another file":
        mine.write_text("keep me")
    path = tmp_path / "live" / name
    path.symlink_to(mine)
    for repair in (False, True):
        with pytest.raises(UserError, match=rf"live/{name}: cannot be read \(it is a symbolic"):
            Live(tmp_path, "ghost", "b", SHAPE, repair=repair)
    assert path.is_symlink() and mine.exists() == (target == "another file")
    assert not mine.exists() or mine.read_text() == "keep me"
    path.unlink()
    live = Live(tmp_path, "ghost", "b", SHAPE)
    path.symlink_to(mine)  # after the check
    with pytest.raises(UserError, match=rf"live/{name}: cannot be written"):
        live.add(record(0), mean(0))
        live.judge("one", {"pos_p0_q0": {"score": 3}})
    assert not mine.exists() or mine.read_text() == "keep me"
