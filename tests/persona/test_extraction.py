"""Rankings and statistics of given projections, and replies that are read again in pieces."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from jaxpersona.persona import reread as module
from jaxpersona.persona.exporting import _has_surrogates
from jaxpersona.persona.extraction import Extraction, save_analysis
from jaxpersona.runs.published import published_record
from jaxpersona.vectors.vector import Axis

NAN = np.full((1, 2), np.nan)


def made(**fields):
    """Two layers; role b has a mean over more replies than are stored, and c none."""
    component = SimpleNamespace(ratio=np.array([0.75, 0.25] + 20 * [1e-8]))
    analysis = SimpleNamespace(names=["a"], axis=np.ones((2, 3)), components=[component] * 2,
                               cos_pc1=np.array([0.5, 0.123456789]))
    table = {"p25": np.array([1.0, 2.0])}
    return Extraction(**{
        "axis": Axis(np.ones((2, 3)), "assistant", "tiny", percentiles={"default": table}),
        "analysis": analysis, "default": np.ones((2, 3)), "role_means": {}, "tokens": 5,
        "projections": {"c": NAN, "default": np.array([[0.0, 4.0]]),
                        "a": np.concatenate([np.array([[1.0, 5.0], [3.0, 7.0]]), NAN]),
                        "b": np.array([[9.0, 9.0]])},
        "counts": {"a": {"0": 1, "3": 2}, "b": {"3": 4}}, "rollouts": 9,
        "mean_projections": {"b": np.array([2.5, 1.5])}, "sizes": {"a": 3, "b": 4},
        "intervals": {"default": {"p25": (np.array([0.5, 1.5]), np.array([1.5, 2.5]))}}, **fields})


def test_a_ranking_ignores_empty_replies_and_ends_with_roles_that_have_no_other():
    found = made().ranking(1)
    assert [(row["role"], row["projection"], row["answers"]) for row in found[:3]] == [
        ("a", 6.0, 3), ("default", 4.0, 1), ("b", 1.5, 4)]
    assert (found[0]["p25"], found[0]["p75"], found[0]["scores"]) == (5.5, 6.5, [1, 2])
    assert [row["in_axis"] for row in found] == [True, False, False, False]
    assert found[3]["role"] == "c" and np.isnan([found[3]["projection"], found[3]["p25"]]).all()
    assert [row["role"] for row in made().ranking(0)] == ["b", "a", "default", "c"]
    assert made().facts() == {"model": "tiny", "layer": 1, "rollouts": 9}


def test_the_statistics_of_a_run_are_written(tmp_path):
    save_analysis(tmp_path, made(), ["b"])
    told = json.loads((tmp_path / "analysis.json").read_text())
    assert told["layers"] == 2 and told["cos_pc1_axis"] == [0.5, 0.123457]
    assert [len(row) for row in told["variance_ratio"]] == [20, 20]
    assert told["variance_ratio"][0][:3] == [0.75, 0.25, 0.0]
    assert told["thresholds"] == {"default": {"p25": {
        "value": [1.0, 2.0], "low": [0.5, 1.5], "high": [1.5, 2.5]}}}
    assert told["roles"]["a"] == {
        "mean_projection": [2.0, 6.0], "quartiles": [[1.5, 5.5], [2.5, 6.5]], "rollouts": 3,
        "kept_means": 3, "held_out": False, "in_axis": True, "scores": {"0": 1, "3": 2}}
    assert np.isnan(told["roles"]["c"]["quartiles"]).all()  # and no warning
    about = told["roles"]["b"]
    assert (about["mean_projection"], about["rollouts"], about["kept_means"]) == ([2.5, 1.5], 4, 1)
    assert about["held_out"] and not about["in_axis"]
    assert told["roles"]["default"]["scores"] is None and told["roles"]["default"]["rollouts"] == 1


def test_many_replies_are_read_again_in_order_and_in_pieces(monkeypatch):
    """The generated ids are used where they are stored, even if there are none."""
    read = []
    monkeypatch.setattr(module.prompts, "encode", lambda model, start: start[-1]["content"])
    monkeypatch.setattr(module.chat, "answered",
                        lambda tokenizer, row, ids: (row, np.asarray(ids).tolist()))

    def extract(model, rows, **options):
        read.append(rows)
        assert options["on_nonfinite"] == "raise"
        return SimpleNamespace(captured={"mean": [row[0] for row in rows]})

    monkeypatch.setattr(module, "extract", extract)
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: (
        [ord(letter) for letter in text] + [0] * add_special_tokens))
    model = SimpleNamespace(tokenizer=tokenizer)

    def record(i, **more):
        return {"conversation": [{"role": "user", "content": str(i)},
                                 {"role": "assistant", "content": "ab"}], **more}

    records = [record(0, reply_ids=[7]), record(1, reply_ids=[]), *map(record, range(2, 130))]
    assert list(module.reread(model, records)) == [str(i) for i in range(130)]
    assert [len(rows) for rows in read] == [64, 64, 2]
    assert read[0][:3] == [("0", [7]), ("1", []), ("2", [97, 98])]
    assert module.reply_ids(model, "ab", np.array([97, 98])) == {}
    assert module.reply_ids(model, "ab", np.array([97, 98, 0])) == {"reply_ids": [97, 98, 0]}


TALK = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"}]
RECORD = {"system_prompt": "s", "prompt_index": 1, "question_index": 2, "question": "u",
          "conversation": TALK, "label": "default", "sample": 0, "reply_ids": [5]}


@pytest.mark.parametrize(("change", "wanted"), [
    ({}, False), ({"system_prompt": "\ud800"}, True), ({"question": "\udfff"}, True),
    ({"question": "\ud7ff\ue000"}, False),
    ({"conversation": [*TALK[:2], {"role": "assistant", "content": "x\udc00"}]}, True)])
def test_half_a_surrogate_pair_in_any_text_is_seen(change, wanted):
    assert _has_surrogates({**RECORD, **change}) == wanted


def test_only_a_system_prompt_is_folded_and_the_rollout_stays_as_it_is():
    plain, folded = published_record(RECORD), published_record(RECORD, fold_system=True)
    assert list(plain) == list(folded) and "sample" not in plain and plain["label"] == "pos"
    assert plain["conversation"] == TALK and TALK[1] == {"role": "user", "content": "u"}
    assert folded["conversation"] == [{"role": "user", "content": "s\n\nu"}, TALK[2]]
    bare = {**RECORD, "conversation": TALK[1:]}
    assert published_record(bare, fold_system=True)["conversation"] == TALK[1:]
