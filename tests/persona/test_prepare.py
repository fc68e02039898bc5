"""What is checked before a run: numbers of rollouts, names and lengths."""

from __future__ import annotations

import dataclasses

import pytest
import support as s

from jaxpersona.data.texts import Question, Role
from jaxpersona.errors import UserError
from jaxpersona.judges.judges import NoJudge
from jaxpersona.persona.prepare import check_prompts, check_redo, check_texts, rollouts_of
from jaxpersona.runs.rollouts import Settings, opening
from jaxpersona.text import chat

ROLES = [Role("default", ("", "b", "c", "d"), ""), Role("one", ("a", "b", "c"), ""),
         Role("two", ("a", "b"), ""), Role("small", ("a",), "")]
QUESTIONS = [Question(0, "Why?"), Question(1, "How?")]


def checked(roles=ROLES, questions=QUESTIONS, settings=None, **options):
    return check_texts(roles, questions, settings or Settings(samples=3), **{
        "min_count": 1, "held_out": (), "judge": NoJudge(), **options})


def test_rollouts_are_prompts_times_questions_times_samples():
    assert rollouts_of(ROLES, QUESTIONS, Settings(samples=3)) == {
        "default": 24, "one": 18, "two": 12, "small": 6}


@pytest.mark.parametrize(("held_out", "most"), [((), 12), (("one",), 6), (("small",), 12)])
def test_two_roles_that_are_not_held_out_can_reach_min_count(held_out, most):
    """The second largest role decides; neither the default persona nor a held-out role counts."""
    assert checked(held_out=held_out, min_count=most) == (ROLES, QUESTIONS, list(held_out))
    with pytest.raises(UserError, match=f"min_count can be at most {most}: lower"):
        checked(held_out=held_out, min_count=most + 1)


@pytest.mark.parametrize(("options", "wanted"), [
    ({"held_out": "one"}, r"held_out is one string \('one'\)"),
    ({"held_out": ["x", "one"]}, r"held_out contains unknown roles \['x'\]"),
    ({"held_out": ["default"]}, "held_out must not contain it"),
    ({"roles": ROLES[1:]}, "must contain a role named 'default'"),
    ({"held_out": ["one", "two"]}, "roles has 1 role besides the default"),
    ({"roles": ROLES[:2]}, "roles has 1 role besides the default"),
    ({"min_count": 0}, "min_count is 0"), ({"questions": []}, "questions is empty"),
    ({"settings": Settings(top_p=0.0)}, "top_p is 0"),
])
def test_what_gives_no_axis_is_refused(options, wanted):
    with pytest.raises(UserError, match=wanted):
        checked(**options)


def test_only_the_default_persona_needs_no_eval_prompt():
    class Reads(NoJudge):
        reads_eval_prompt = True

    with pytest.raises(UserError, match=r"for 3 roles .one, two, small.; .*give one rubric"):
        checked(judge=Reads())
    full = [ROLES[0], *(dataclasses.replace(r, eval_prompt="{question}") for r in ROLES[1:])]
    assert checked(roles=full, judge=Reads())[0] == full
    with pytest.raises(UserError, match=r"unknown roles \['x', 'y'\]; the roles are \['default'"):
        check_redo(["y", "one", "x"], ROLES)
    check_redo(["one"], ROLES)


def test_the_digests_of_prompts_do_not_depend_on_the_questions_and_the_reverse():
    """A prompt of a role, or the text of a question, changes its own digest alone."""
    model = dataclasses.replace(s.tiny_model(vocab_size=258), tokenizer=s.byte_tokenizer())
    first = check_prompts(model, ROLES, QUESTIONS)
    other = [ROLES[0], dataclasses.replace(ROLES[1], prompts=("a", "b", "d")), *ROLES[2:]]
    longer = [QUESTIONS[0], Question(1, "Who?"), Question(2, "So what?")]
    second = check_prompts(model, other, longer)
    assert list(second) == [*first, "question 2"]
    assert {name for name in first if first[name] != second[name]} == {"role one", "question 1"}
    assert len(set(first.values())) == 6


def test_the_longest_prompt_and_question_must_leave_room_for_a_token():
    """Each question is tried with the longest prompt, and each prompt with the longest question.

    Texts may have fewer characters than the longest ones and more tokens.
    """
    model = dataclasses.replace(s.tiny_model(vocab_size=258), tokenizer=s.byte_tokenizer())
    room = model.config.max_context - chat.encode_row(
        model.tokenizer, opening("x" * 9, "y" * 20)).tokens.size
    roles = [ROLES[0], Role("long", ("short", "x" * (9 + room - 1)), "")]
    questions = [Question(0, "y"), Question(7, "y" * 20)]
    digests = check_prompts(model, roles, questions)
    assert list(digests) == ["role default", "role long", "question 0", "question 7"]
    wide = "éé" + "x" * (5 + room)
    for cast, asked in (
            ([roles[0], Role("long", ("short", "x" * (9 + room)), "")], questions),
            ([roles[0], Role("long", (wide, roles[1].prompts[1]), "")], questions),
            (roles, [questions[0], Question(7, "y" * 21)]),
            (roles, [Question(0, "é" * 19), questions[1]])):
        with pytest.raises(UserError, match=r"has \d+ tokens; prompt and reply must fit into"):
            check_prompts(model, cast, asked)
    with pytest.raises(UserError, match="has no tokenizer"):
        check_prompts(dataclasses.replace(model, tokenizer=None), roles, questions)
