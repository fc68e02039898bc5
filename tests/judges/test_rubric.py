"""Prompts, parsers and the protocol of judges."""

from __future__ import annotations

import dataclasses

import pytest

import jaxpersona as jp
from jaxpersona.data.texts import Role, Trait
from jaxpersona.judges.judges import NoJudge
from jaxpersona.judges.protocol import TRAIT_SCALE, Item, Verdict, arranged, in_order
from jaxpersona.judges.rubric import ROLES, TRAITS, Rubric, of_trait

ROLE = Role("ghost", ("You are a ghost.",), "Q {question} A {answer}", "lingers")
ITEM = Item("a", ROLE, "Who {answer}?", "Boo {question}.")


@pytest.mark.parametrize(("text", "score"), [
    ("3", 3), ("Score: 2", 2), ("**1**", 1), ("0.", 0), ("7", None), ("-1", None), ("12", None),
    ("Score:-1", None), ("score-3", 3), ("2.5", None), ("1,2", None), ("I'd say 9, no, 2", 2),
    ("3/3", 3), ("", None), ("three", None), ("9" * 5000, None), ("٣", 3), ("−2", None),
    ("(-1)", None), ("*-1*", None), ("5-2", None), ("1.2.3", None), ("1, 2", 1), ("2,", 2),
    ("-1, or 2", 2), ("0002", 2), ("0000000002", None), ("4 or 1", 1), ("a2", 2),
])
def test_the_first_integer_of_the_scale_is_the_score(text, score):
    assert ROLES.read(text) == (score, score == 0)


@pytest.mark.parametrize(("text", "found"), [
    ("57", (57, False)), ("0", (0, False)), ("100", (100, False)), ("101", (None, False)),
    ("REFUSAL", (None, True)), ("REFUSAL, so 0", (None, True)), ("REFUSALS 5", (5, False)),
])
def test_traits_have_a_word_for_refusals(text, found):
    assert TRAITS.read(text) == found


def test_a_prompt_is_filled_in_one_pass():
    assert ROLES.prompt(ITEM) == "Q Who {answer}? A Boo {question}."
    own = Rubric(template="{role}, which {description}: {question} {answer} {other}")
    assert own.prompt(ITEM) == "ghost, which lingers: Who {answer}? Boo {question}. {other}"
    with pytest.raises(jp.UserError, match="'ghost' has no eval_prompt"):
        ROLES.prompt(dataclasses.replace(ITEM, role=dataclasses.replace(ROLE, eval_prompt="")))
    with pytest.raises(jp.UserError, match="lacks {answer}"):
        Rubric(template="{question}")
    for scale in ((), (1, 0), (0, 0), (-1, 0)):
        with pytest.raises(jp.UserError, match="increasing"):
            Rubric(scale)


def test_the_digest_covers_template_scale_and_parser():
    many = [ROLES, TRAITS, Rubric(template="{question} {answer}"), Rubric((0, 1)),
            Rubric(TRAIT_SCALE)]
    assert len({rubric.digest for rubric in many}) == len(many)
    assert Rubric().digest == ROLES.digest


def test_a_trait_is_judged_as_a_role():
    role = of_trait(Trait("poetic", (("Sing.", "Talk."),), ("Why?",), "T {question} {answer}"))
    assert role == Role("poetic", ("Sing.",), "T {question} {answer}")


class Broken(NoJudge):
    """A judge that yields what it was given."""

    def __init__(self, *verdicts):
        self.verdicts = verdicts

    def score(self, items):
        yield from self.verdicts


@pytest.mark.parametrize("scale", [(), (0.5, 1), (0, True), (1, 0), (1, 1), (-1, 0), ("0", "1")])
def test_a_scale_consists_of_increasing_integers(scale):
    with pytest.raises(jp.UserError, match="give non-negative integers in increasing order"):
        Rubric(scale=scale)


def test_lone_surrogates_of_an_answer_are_replaced():
    """An endpoint's JSON can contain them, but a file of verdicts cannot."""
    found = Verdict("a", raw="x\ud800y", error="\udfff")
    assert (found.raw, found.error) == ("x\ufffdy", "\ufffd")
    assert Verdict("a", raw="é\U0001f600").raw == "é\U0001f600"


def test_a_judge_gives_one_verdict_per_item_in_any_order():
    other = dataclasses.replace(ITEM, key="b")
    found = in_order(Broken(Verdict("b", 1), Verdict("a", error="later")), [ITEM, other])
    assert [v.key for v in found] == ["a", "b"] and found[0].error == "later"
    for verdicts, wanted in (
            ((Verdict("a", 1),), "gave 1 verdicts on 2"), ((Verdict("a", 1),) * 2, "or already"),
            ((Verdict("c", 1),), "unknown"), ((Verdict("a", 4),), "the score 4"),
            ((Verdict("a", True),), "the score True"), ((Verdict("a", 1.0),), "the score 1.0")):
        with pytest.raises(jp.UserError, match=wanted):
            in_order(Broken(*verdicts), [ITEM, other])
    with pytest.raises(jp.UserError, match="keys must differ"):
        arranged(NoJudge(), [ITEM, ITEM], [Verdict("a", 3)])
