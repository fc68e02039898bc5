"""The benchmark of released models: statistics of halves, capability, caps and stored answers."""

from __future__ import annotations

import argparse
import sys
import types

import numpy as np
import pytest
from test_bench import BENCH

from jaxpersona.data.texts import Question, Role

NAMES = ("common", "decoding", "peers", "real_answers", "real_axis", "real_caps", "real_page",
         "real_questions", "real_speed", "real_stats")


@pytest.fixture(autouse=True)
def bench_folder(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield
    for name in NAMES:
        sys.modules.pop(name, None)


def answers(*halves):
    """Three answers to each half of the questions at two layers, and an empty answer."""
    rows = [np.stack([half] * 3) for half in halves]
    return np.concatenate([*rows, np.full((1, 2, 2), np.nan)]).astype(np.float32)


HALVES = np.array([False] * 3 + [True] * 3 + [True])
# layer 0: the persona differs along x in the first half and along y in the second; layer 1: along x
MEANS = {"default": answers([[1, 0], [1, 0]], [[0, 1], [1, 0]]),
         "ghost": answers([[-1, 5], [-1, 0]], [[5, -1], [-2, 0]]),
         "sage": answers([[-1, -5], [-1, 0]], [[-5, -1], [-3, 0]])}


def test_questions_with_an_odd_index_are_the_second_half():
    from real_stats import halves_of

    asked = [Question(i, "Why?") for i in (4, 9, 2, 7)]
    records = [{"question_index": i} for i in (2, 4, 7, 9, 9)]
    assert halves_of(records, asked).tolist() == [False, False, True, True, True]


def test_the_auc_is_that_of_answers_that_do_not_define_the_axis():
    from real_stats import auc

    assert auc(MEANS, dict.fromkeys(MEANS, HALVES)) == [0.5, 1.0]


def test_the_reliability_of_roles_is_that_of_their_differences_from_the_mean_role():
    from real_stats import reliability

    shared = np.array([9.0, 9.0])  # equal in all roles, so it must not count
    means = {"default": answers([[2, 0], [0, 3]], [[0, 2], [0, 1]])}
    for name, one, two in (("ghost", [1, 0], [1, 0]), ("sage", [-1, 0], [-1, 0])):
        means[name] = answers([np.add(one, shared), one], [np.add(two, shared), np.negative(two)])
    found = reliability(means, dict.fromkeys(means, HALVES))
    a, b = np.array([2.0, 0]) - shared, np.array([0, 2.0]) - shared
    assert found["axis_reliability"] == [round(a @ b / (a @ a), 4), 1.0]
    assert found["role_reliability"] == [1.0, -1.0]


@pytest.mark.parametrize("answer, right", [
    ("5", True), ("It is 5.", True), ("Five!", True), ("(5)", True), ("5, of course", True),
    ("5.5", False), ("0.5", False), ("15", False), ("52", False), ("fivefold", False), ("", False)])
def test_a_right_answer_has_the_expected_word_or_number_as_a_whole(answer, right):
    from real_questions import QUESTIONS, correct

    assert correct(answer, ("5", "five")) == right
    assert len(QUESTIONS) == 40
    assert all(correct(f"I say {word.upper()}.", words) for _, words in QUESTIONS for word in words)


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """The stage `cap` of a model that answers "Five." and changes a known number of activations."""
    import real_caps

    calls = []
    axis = types.SimpleNamespace(
        values=np.zeros((10, 4)),
        thresholds=lambda q, of: np.arange(10.0) + {"all": 0, "default": 100}[of])

    def generate(model, talks, *, interventions, **settings):
        calls.append((interventions, len(talks), settings))
        applied = [] if interventions is None else [types.SimpleNamespace(
            changed=np.array([[1, 2, 0], [0, 3, 1]]), seen=np.array([4, 5, 1]))]
        return types.SimpleNamespace(text=["Five."] * len(talks), applied=applied)

    ppl = types.SimpleNamespace(perplexity=lambda where: 7.0)
    monkeypatch.setattr(real_caps, "jp", types.SimpleNamespace(
        load_axis=lambda file: axis, generate=generate, response=None,
        cap=lambda axis, **given: given, logprobs=lambda *_, **__: ppl))
    monkeypatch.setattr(real_caps, "loaded", lambda *_: None)
    monkeypatch.setattr(real_caps, "cap_layers", lambda model: range(7, 9))
    said = [{"conversation": [{"role": "assistant", "content": text}]} for text in ("a", "", "b")]
    monkeypatch.setattr(real_caps, "answers", lambda args: {"default": said})
    roles = [Role(name, (f"Be {name}.",), "{question} {answer}") for name in ("ghost", "sage")]
    monkeypatch.setattr(real_caps.texts, "load_roles", lambda _: roles)
    monkeypatch.setattr(real_caps.texts, "load_questions",
                        lambda _: [Question(i, f"Q{i}?") for i in range(5)])
    monkeypatch.setattr(real_caps, "QUESTIONS", (("2 + 3?", ("5", "five")), ("1 + 1?", ("2",))))
    (tmp_path / "axis.json").write_text('{"ranking": {"order": ["sage", "unknown", "ghost"]}}')
    args = argparse.Namespace(out=tmp_path, model="m", dtype="float32", questions=1,
                              cap_questions=2, ordinary=9, seed=0, new=48, batch=32)
    return real_caps.cap_stage(args), calls


def test_caps_are_measured_on_other_questions_beside_controls(stage):
    found, calls = stage
    assert found["roles"] == ["ghost", "sage"], "the farthest role comes first"
    assert found["layers"] == [7, 9] and found["ordinary"] == 2  # one answer is empty
    asked = [(reply["role"], reply["question"]) for reply in found["replies"]]
    assert asked == [(role, q) for role in ("ghost", "sage") for q in ("Q1?", "Q2?")]
    edits = dict(zip(found["arms"], [edit for edit, *_ in calls[::2]], strict=True))
    assert edits["none"] is None
    assert [edits[name]["floor"].tolist() for name in ("cap", "control", "high cap",
                                                       "high control")] == [
        [7, 8], [7, 8], [107, 108], [107, 108]]
    assert [name for name, edit in edits.items() if edit and edit["push"] is not None] == [
        "control", "high control"]


def test_the_changed_share_is_that_of_pairs_of_a_capped_layer_and_a_token(stage):
    found, _ = stage
    shares = {name: arm["changed_share"] for name, arm in found["arms"].items()}
    assert shares == {"none": 0.0, **dict.fromkeys(
        ("cap", "control", "high cap", "high control"), 7 / (2 * 10))}
    assert {arm["correct"] for arm in found["arms"].values()} == {1}


def test_the_change_of_an_arm_is_paired_with_the_answers_without_a_cap():
    from real_caps import against

    out = {"arms": {"none": {"expected": [1.0, 3.0, 0.0, 2.0]}}}
    assert against(np.ones(4), out, "none") == {}
    assert against(np.array([0.5, 2.5, -0.5, 1.5]), out, "cap") == {
        "change": -0.5, "interval": [-0.5, -0.5]}
    wide = against(np.array([0.0, 3.0, 0.0, 2.0]), out, "cap")
    assert wide["change"] == -0.25 and wide["interval"] == [-0.75, 0.0]


def test_exported_answers_are_read_back_and_means_are_evenly_spaced(tmp_path):
    from real_answers import answers as read
    from real_answers import cap_layers, export, spaced

    args = argparse.Namespace(out=tmp_path, judged_each=2)
    records = {name: [{"question": f"{name} {i} \u2028"} for i in range(5)]
               for name in ("default", "ghost")}
    means = {name: np.arange(5.0).reshape(5, 1, 1) for name in records}
    export(args, records, means)
    found = read(args)
    assert [(r["index"], r["question"]) for r in found["ghost"]] == [
        (i, f"ghost {i} \u2028") for i in range(5)]
    held = np.load(tmp_path / "means.npz")
    assert held["default"].ravel().tolist() == [0, 1, 2, 3, 4]
    assert held["ghost"].ravel().tolist() == [0, 4] == spaced(5, 2).tolist()
    assert spaced(2, 4).tolist() == [0, 1]
    with (np.errstate(over="ignore"),
          pytest.raises(ValueError, match="response mean of ghost overflows float16")):
        export(args, records, {"ghost": np.full((5, 1, 1), 1e6)})
    config = types.SimpleNamespace(n_layers=30)
    assert cap_layers(types.SimpleNamespace(config=config)) == range(21, 25)


def test_a_ranking_names_both_ends_and_the_default_persona():
    from real_axis import EXTREMES, ranking

    places = {"default": 9.0, **{f"r{i:02}": float(i) for i in range(40)}}
    found = types.SimpleNamespace(projections=places,
                                  mean_projection=lambda name: [0.0, places[name]])
    out = ranking(found, 1)
    assert out["default"] == 9.0 and out["order"] == [f"r{i:02}" for i in range(39, -1, -1)]
    assert out["nearest"][0] == ["r39", 39.0] and out["farthest"][0] == ["r00", 0.0]
    assert len(out["nearest"]) == len(out["farthest"]) == EXTREMES
