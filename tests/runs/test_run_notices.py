"""What a run says about an earlier call, and the names and keys of its files."""

from __future__ import annotations

import json

import pytest

from jaxpersona.errors import UserError
from jaxpersona.runs.compare import shown
from jaxpersona.runs.names import judge_folder
from jaxpersona.runs.older import Older, same
from jaxpersona.runs.rollouts import Settings, generation, place_of_key
from jaxpersona.runs.run import Run
from jaxpersona.runs.status import Status, describe, kept

FIRST = {"roles": {"default": "a"}, "questions": {"0": "q"}, "judges": {"j": {}}, "model": {},
         "arguments": {}, "numerics": {}, "last": {"judge": "j", "keep": None, "gone": 1}}


def test_a_call_says_how_it_differs_from_the_one_before(tmp_path):
    with Run.open(tmp_path / "run", FIRST) as run:
        assert run.notices == [] and run.judge == "j"
    more = {**FIRST, "roles": {f"r{i}": "b" for i in range(6)}, "questions": {"0": "q", "7": "z"},
            "judges": {"k": {}}, "last": {"judge": "k" * 90, "keep": 4, "new": 1}}
    with Run.open(tmp_path / "run", more) as run:
        assert run.notices == [
            "the run is extended; new roles (6): r0, r1, r2, r3, r4, …",
            "the run is extended; new questions (1): 7",
            f'judge was "j", now "{"k" * 78}…; existing results are reused',
            "keep was null, now 4; existing results are reused"]
    stored = Run.read(tmp_path / "run").manifest
    assert list(stored["roles"]) == ["default", *more["roles"]] and stored["judges"] == {
        "j": {}, "k": {}}
    assert stored["last"] == more["last"]
    assert shown("x" * 78) == f'"{"x" * 78}"' and shown("x" * 79) == f'"{"x" * 78}…'


def test_judges_with_long_names_have_their_own_folders():
    assert judge_folder("a/b") == "a%2Fb" and judge_folder("x" * 100) == "x" * 100
    long = [judge_folder("x" * 100 + end) for end in "yz"]
    assert len(set(long)) == 2 and {len(name) for name in long} == {100}
    assert all(name.startswith("x" * 83 + "-") for name in long)


def test_the_settings_of_a_run_are_those_of_its_generation():
    found = generation(Settings(0.5, 0.8, 9, 3, 4, 11, True))
    assert {field: value for field, value in found.items() if field != "capture"} == {
        "max_new_tokens": 9, "temperature": 0.5, "top_p": 0.8, "seed": 11, "batch_size": 4,
        "share_prefix": True}
    for field, limit in (("samples", 100_000), ("batch_size", 65_536)):
        Settings(**{field: limit})
        for wrong in (0, limit + 1):
            with pytest.raises(UserError, match=f"{field} is {wrong}"):
                Settings(**{field: wrong})


def test_a_key_has_the_place_of_its_rollout():
    keys = ["pos_p1_q10", "pos_p10_q2_s3", "default_p0_q2", "pos_p2_q2"]
    assert [place_of_key(key) for key in keys] == [(10, 1, 0), (2, 10, 3), (2, 0, 0), (2, 2, 0)]


def older(folder, **fields):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"format": "jaxpersona-run 2", "model": {},
                                                 "arguments": {}, "numerics": {}, **fields}))
    return Older(folder)


def test_a_run_of_format_2_must_have_the_model_settings_and_device(tmp_path):
    manifest = {"model": {"fingerprint": "f", "layers": 3, "width": 4},
                "numerics": {"platform": "cpu"}, "arguments": {"seed": 0, "share_prefix": False}}
    found = older(tmp_path / "old", model={"fingerprint": "f", "name": "tiny"},
                  arguments={"seed": 0, "judge": "rules"}, numerics={"platform": "cpu"})
    found.check(manifest)
    assert found.judge == "rules" and older(tmp_path / "bare").judge == ""
    for part, change, wanted in (
            ("model", {"fingerprint": "g"}, "model.fingerprint was 'f', now 'g'"),
            ("arguments", {"seed": 1}, "arguments.seed was 0, now 1"),
            ("numerics", {"platform": "gpu"}, "numerics.platform was 'cpu', now 'gpu'"),
            ("arguments", {"share_prefix": True}, "arguments.share_prefix was False, now True")):
        with pytest.raises(UserError, match=wanted):
            found.check({**manifest, part: {**manifest[part], **change}})
    text = {"system_prompt": "a", "question": "b"}
    assert same(text, {**text, "more": 1}) and not same(text, {}) and not same({}, text)
    assert not any(same(text, {**text, field: "x"}) for field in text)


@pytest.mark.parametrize(("scores", "fine"), [
    ({"a": 0, "b": 3, "c": None}, True), ({}, True), ({"a": 4}, False), ({"a": -1}, False),
    ({"a": True}, False), ({"a": 2.0}, False), ([3], False), (None, False)])
def test_scores_of_format_2_are_from_0_to_3(tmp_path, scores, fine):
    found = older(tmp_path / "old")
    assert found.scores("a/b") == {} and list(found.rollouts("a/b")) == []
    (tmp_path / "old" / "scores").mkdir()
    (tmp_path / "old" / "scores" / "a%2Fb.json").write_text(json.dumps({"scores": scores}))
    if fine:
        assert found.scores("a/b") == scores
    else:
        with pytest.raises(UserError, match="a%2Fb.json: damaged"):
            found.scores("a/b")


def test_what_a_stopped_run_keeps_is_counted_once(tmp_path):
    """A closed role that is extended counts by its closed file; first lines are no entries."""
    for name, lines in (("rollouts/a.jsonl", 3), ("rollouts/.c.jsonl", 9), ("live/a.jsonl", 4),
                        ("live/b.jsonl", 3), ("live/b.verdicts.jsonl", 2), ("live/.x.jsonl", 9)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n" * lines)
    assert kept(tmp_path) == (5, 1, 1)
    assert kept(tmp_path / "none") == (0, 0, 0)


def test_the_time_left_is_unknown_before_the_first_rollout(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("jaxpersona.runs.status.time.time", lambda: clock[0])
    status = Status(tmp_path, total=100, to_judge=80, roles=4, write=False)
    status.done = status.judged = 60
    status.begin()
    clock[0] += 10
    assert status.value("running")["seconds_left"] is None  # no rate
    status.done = 80
    assert status.value("running")["seconds_left"] == 10  # no verdict yet: only of the rollouts
    status.done, status.judged = 100, 65
    assert status.value("running")["seconds_left"] == 30  # 15 verdicts at one in two seconds
    assert status.value("stopped")["seconds_left"] is None
    clock[0] += 90
    status.failed, status.closed = 2, 3
    found = status.value("running")
    assert (found["seconds"], found["updated"][-14:]) == (100.0, "00:18:20+00:00")
    lines = describe(found)
    assert lines[0] == ("running: 100 of 100 rollouts, 65 of 80 verdicts, 3 of 4 roles complete")
    assert "replies on which the judge failed: 2 (judged again when the run is resumed)" in lines
    assert "time left: about 5 min" in lines and not any("rate" in line for line in lines)
    assert ", 2 min after the start, by process" in lines[-1]
    found |= {"seconds": 99.4, "seconds_left": 6000}
    assert "time left: about 1.7 h" in describe(found) and ", 99 s after" in describe(found)[-1]
    assert not list(tmp_path.iterdir())
