"""The digit judge compared with the logits of its prompts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import support as s
from scipy.special import softmax

import jaxpersona as jp
from jaxpersona.data.texts import Question, Role
from jaxpersona.judges import digits
from jaxpersona.judges.digits import LEAST_MASS, DigitJudge, Verdicts
from jaxpersona.runs.run import Run

ROLE = Role("ghost", ("You are a ghost.",), "Asked: {question} Said: {answer} Grade 0-3.")


def record(answer, question="Who?"):
    return {"question": question, "conversation": [{"role": "user", "content": question},
                                                   {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def model():
    return dataclasses.replace(s.tiny_model(vocab_size=258), tokenizer=s.byte_tokenizer())


def test_the_probabilities_are_those_of_the_digits_as_the_next_token(model):
    answers = ["boo", "I am an AI {not a format field}", "x" * 70]
    found = DigitJudge(model).verdicts(ROLE, [record(a) for a in answers])
    ids = [model.tokenizer.convert_tokens_to_ids(d) for d in "0123"]
    for answer, each, mass in zip(answers, found.probabilities, found.mass, strict=True):
        text = f"Asked: Who? Said: {answer} Grade 0-3."
        row = jp.encode(model, [text])
        _, logits = s.residuals(model, row)
        last = softmax(logits[0, int(row.length[0]) - 1].astype(np.float64))[ids]
        assert mass == pytest.approx(last.sum(), rel=1e-4)
        np.testing.assert_allclose(each, last / last.sum(), rtol=1e-4)
        assert found.expected[answers.index(answer)] == pytest.approx(
            (last / last.sum()) @ [0, 1, 2, 3], rel=1e-4)


class Wider:
    """A tokenizer with more tokens for the digits 2 and 3, such as those with a leading space."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *args, **named):
        return self.inner(*args, **named)

    def get_vocab(self):
        return {**self.inner.get_vocab(), "Ġ2": 70, "▁2": 71, "Ġ3": 72}


def test_all_tokens_of_a_digit_count(model):
    wide = dataclasses.replace(model, tokenizer=Wider(model.tokenizer))
    found = DigitJudge(wide).verdicts(ROLE, [record("boo")])
    ids = [model.tokenizer.convert_tokens_to_ids(d) for d in "0123"]
    row = jp.encode(model, ["Asked: Who? Said: boo Grade 0-3."])
    _, logits = s.residuals(model, row)
    last = softmax(logits[0, int(row.length[0]) - 1].astype(np.float64))
    each = np.array([last[ids[0]], last[ids[1]], last[[ids[2], 70, 71]].sum(),
                     last[[ids[3], 72]].sum()])
    assert found.mass[0] == pytest.approx(each.sum(), rel=1e-4)
    np.testing.assert_allclose(found.probabilities[0], each / each.sum(), rtol=1e-4)


def test_a_score_needs_mass_on_the_digits():
    even = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]])
    found = Verdicts(even, np.array([LEAST_MASS, 0.9, LEAST_MASS - 1e-9]))
    assert found.scores == [3, 0, None]
    np.testing.assert_allclose(found.expected, [2.0, 0.6, 0.6])


def test_it_is_a_judge(model):
    judge = DigitJudge(model)
    records = [record("boo"), record("no")]
    assert judge(ROLE, records) == judge.verdicts(ROLE, records).scores
    assert judge(ROLE, []) == []
    assert judge.settings["fingerprint"] == model.fingerprint


def test_what_it_needs_is_said(model):
    with pytest.raises(jp.UserError, match="has no tokenizer"):
        DigitJudge(s.tiny_model())
    with pytest.raises(jp.UserError, match="'ghost' has no eval_prompt"):
        DigitJudge(model)(dataclasses.replace(ROLE, eval_prompt=""), [record("boo")])

    class WithoutDigits:
        def get_vocab(self):
            return {"0": 5, "1": 6, "3": 7}

    with pytest.raises(jp.UserError, match="no token for the digit 2"):
        DigitJudge(dataclasses.replace(model, tokenizer=WithoutDigits()))


def test_the_command_judges_with_another_model(tmp_path, monkeypatch):
    """`axis --judge model:mini` stores the scores that the judge gives to the run's rollouts."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    monkeypatch.setattr(digits, "LEAST_MASS", 0.0)
    checkpoint = s.random_checkpoint(tmp_path / "model", Qwen3ForCausalLM,
                                     Qwen3Config(**s.BYTE_MODEL))
    s.byte_tokenizer().save_pretrained(checkpoint)
    roles = [Role("default", ("",), ""), *(Role(name, (f"You are a {name}.",), "")
                                           for name in ("ghost", "baker"))]
    texts = s.write_texts(tmp_path, roles, [Question(i, f"Who {i}?") for i in range(3)])
    command = s.axis_command(checkpoint, texts, tmp_path / "out", "--judge", "model:mini")
    assert s.run_command(command) in (0, 2)  # 2, if by chance too few replies have score 3
    run = Run.read(tmp_path / "out")
    judged = run.manifest["arguments"]
    assert judged["judge"] == "digits" and judged["judge_settings"]["model"] == "mini"
    judge = DigitJudge(jp.load("mini"))
    for name in ("ghost", "baker"):
        records = run.rollouts(name)
        role = Role(name, ("x",), "{question} {answer}?")
        assert list(run.scores(name).values()) == judge(role, records)
