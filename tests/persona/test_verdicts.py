"""Replies as items, samples of replies by score, and a judge in its own thread."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import support as s

from jaxpersona.data.texts import Role
from jaxpersona.errors import UserError
from jaxpersona.judges.protocol import Item, Verdict
from jaxpersona.persona.judging import Judging
from jaxpersona.persona.verdicts import items_of, replies_of, sample, scores_of, verdict_counts

GHOST = Role("ghost", ("Be a ghost.",), "", "lingers")


def record(question, *said, sample=0):
    talk = [{"role": "system", "content": "Be a ghost."}, {"role": "user", "content": "Who?"}]
    return {"label": "pos", "prompt_index": 0, "question_index": question, "sample": sample,
            "question": f"Who {question}?", "system_prompt": "Be a ghost.",
            "conversation": [*talk, *({"role": "assistant", "content": x} for x in said)]}


def test_an_item_has_the_first_reply_of_its_conversation():
    first, second = items_of(GHOST, [record(4, "Boo.", "More."), record(5, sample=2)])
    assert first == Item("pos_p0_q4", GHOST, "Who 4?", "Boo.", "Be a ghost.")
    assert (second.key, second.answer) == ("pos_p0_q5_s2", "")


def test_the_replies_of_a_run_have_the_descriptions_of_their_roles():
    texts = {"ghost": [record(0, "Boo.")], "sage": [record(1, "Hm.")], "new": None}
    run = SimpleNamespace(manifest={"roles": ["default", *texts]}, rollouts=texts.__getitem__)
    found = replies_of(run, {"ghost": "lingers"})
    assert list(found) == ["ghost/pos_p0_q0", "sage/pos_p0_q1"]
    assert [item.role.description for item in found.values()] == ["lingers", ""]
    assert replies_of(run)["ghost/pos_p0_q0"].role == Role("ghost", (), "")


def test_a_sample_has_replies_of_each_score_from_many_roles():
    """Each role in turn; scores descend, and undecided replies are last."""
    roles = {name: Role(name, (), "") for name in "abc"}
    replies = {f"{name}/{i}": Item(str(i), role, "", "") for name, role in roles.items()
               for i in range(10)}
    scores = {key: 3 for key in replies} | {"a/1": 0, "a/2": None, "b/1": 0, "gone/0": 3}
    found = sample(replies, scores, 15)
    assert [score for _, score in found] == [3] * 15 + [0] * 2 + [None]
    names = [item.role.name for item, score in found if score == 3]
    assert all(set(names[i : i + 3]) == {"a", "b", "c"} for i in range(0, 15, 3))
    assert len({(item.role.name, item.key) for item, _ in found}) == 18
    assert sample(replies, scores, 15) == found != sample(replies, scores, 15, seed=1)
    assert len(sample({"a/0": replies["a/0"]}, scores, 6)) == 1


def test_scores_in_a_file_of_a_person_are_those_that_are_filled_in(tmp_path):
    path = tmp_path / "MINE.CSV"
    path.write_text("item,score,digest\na/0,3,x\na/1,?,x\na/2,,x\n")
    assert scores_of(path) == {"a/0": 3, "a/1": None}
    path.write_text("item,score,digest\na/2,,x\n")
    with pytest.raises(UserError, match="the column 'score' is empty"):
        scores_of(path)


def test_failed_and_undecided_replies_are_counted_apart():
    scores = {"a": 3, "b": None, "c": None, "d": 0}
    assert verdict_counts({"scores": scores, "details": {"b": {"error": "busy"}, "d": {"raw": ""}}}
                          ) == {"0": 1, "1": 0, "2": 0, "3": 1, "None": 1, "failed": 1}
    assert verdict_counts(None) == {"0": 0, "1": 0, "2": 0, "3": 0, "None": 0}


def item(key):
    return Item(key, GHOST, "Who?", "Boo.")


class Paid(s.Scored):
    """A judge whose verdicts cost something, except those that it takes from a file."""

    def score(self, items):
        for one in items:
            yield Verdict(one.key, 3, raw="3", cost=0.5 if one.key != "old" else None)


def test_verdicts_come_with_their_role_and_cost():
    found = list(Judging(Paid(), alone=False).now([item("a"), item("old")]))
    assert [(role, key, cost) for role, key, _, cost in found] == [
        ("ghost", "a", 0.5), ("ghost", "old", 0.0)]
    assert found[0][2] == {"score": 3, "expected": None, "mass": None, "refused": False,
                           "error": None, "raw": "3"}
    assert list(Judging(Paid(), alone=False).now([])) == []


@pytest.mark.parametrize(("alone", "about", "whole", "after"), [
    (True, {}, False, False), (False, {}, True, False), (True, {"together": True}, True, False),
    (True, {"together": True, "after": True}, True, True)])
def test_only_a_judge_without_a_model_has_a_thread(alone, about, whole, after):
    judge = s.Scored()
    vars(judge).update(about)
    before = threading.active_count()
    judging = Judging(judge, alone=alone)
    assert (judging.whole, judging.after) == (whole, after)
    assert threading.active_count() == before + (not whole)
    judging.close()


def test_verdicts_before_an_error_are_taken_first():
    def score(role, key):
        if key == "a":
            raise UserError("the budget is used")
        return 3

    judging = Judging(s.Scored(score), alone=True)
    judging.put([])
    assert judging.left == 0 and judging.take(5.0) == []  # nothing to wait for
    judging.put([item("a"), item("b"), item("c")])  # judged from the last one
    assert judging.left == 3
    found = []
    with pytest.raises(UserError, match="the budget is used"):
        while True:
            found += judging.take(5.0)
    assert [key for _, key, *_ in found] == ["c", "b"] and judging.left == 1
    judging.close()
