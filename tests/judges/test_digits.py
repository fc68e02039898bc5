"""The digit judge compared with the logits of its prompts, and with PyTorch's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import support as s
from scipy.special import softmax

import jaxpersona as jp
from jaxpersona.data.texts import Question, Role
from jaxpersona.judges import digits
from jaxpersona.judges.digits import LEAST_MASS, DigitJudge, Readings
from jaxpersona.judges.judges import SelfJudge
from jaxpersona.judges.protocol import Item, in_order
from jaxpersona.judges.rubric import REFUSAL, TRAITS, Rubric
from jaxpersona.models.model import release
from jaxpersona.runs.run import Run

ROLE = Role("ghost", ("You are a ghost.",), "Asked: {question} Said: {answer} Grade 0-3.")


def items(*answers):
    return [Item(f"q{i}", ROLE, "Who?", answer) for i, answer in enumerate(answers)]


def text_of(answer):
    return f"Asked: Who? Said: {answer} Grade 0-3."


@pytest.fixture(scope="module")
def model():
    return dataclasses.replace(s.tiny_model(vocab_size=258), tokenizer=s.byte_tokenizer())


@pytest.fixture(scope="module")
def hugging(checkpoint):
    """The same checkpoint here and in transformers."""
    from transformers import Qwen3ForCausalLM

    theirs = Qwen3ForCausalLM.from_pretrained(checkpoint, trust_remote_code=False).eval()
    return jp.load(str(checkpoint)), theirs


def test_the_probabilities_are_those_of_the_digits_as_the_next_token(model):
    answers = ["boo", "I am an AI {not a format field}", "x" * 70]
    found = DigitJudge(model).read([text_of(answer) for answer in answers])
    ids = [model.tokenizer.convert_tokens_to_ids(d) for d in "0123"]
    for i, answer in enumerate(answers):
        row = jp.encode(model, [text_of(answer)])
        _, logits = s.residuals(model, row)
        last = softmax(logits[0, int(row.length[0]) - 1].astype(np.float64))[ids]
        assert found.mass[i] == pytest.approx(last.sum(), rel=1e-4)
        np.testing.assert_allclose(found.probabilities[i], last / last.sum(), rtol=1e-4)
        assert found.expected[i] == pytest.approx((last / last.sum()) @ [0, 1, 2, 3], rel=1e-4)
        assert found.greedy[i] == last.argmax()


def theirs_next(theirs, tokens):
    import torch

    with torch.no_grad():
        logits = theirs(torch.tensor([tokens])).logits[0, -1]
    return softmax(logits.double().numpy())


def test_role_scores_are_those_of_pytorch(hugging):
    ours, theirs = hugging
    answers = ["boo", "as an AI model", "No!", "1 2 3"]
    found = DigitJudge(ours).read([text_of(answer) for answer in answers])
    ids = [ours.tokenizer.convert_tokens_to_ids(d) for d in "0123"]
    for i, answer in enumerate(answers):
        tokens = ours.tokenizer.apply_chat_template(
            [{"role": "user", "content": text_of(answer)}], add_generation_prompt=True,
            return_dict=True)["input_ids"]
        p = theirs_next(theirs, tokens)[ids]
        assert found.mass[i] == pytest.approx(p.sum(), abs=1e-4)
        np.testing.assert_allclose(found.probabilities[i], p / p.sum(), atol=1e-4)


def test_trait_scores_are_those_of_pytorch_over_all_numbers(hugging, monkeypatch):
    """Numbers of several digits by the chain rule; a digit alone only where no digit follows."""
    monkeypatch.setattr(digits, "LEAST_BRANCH", 0.0)  # the exact values
    ours, theirs = hugging
    judge = DigitJudge(ours, rubric=TRAITS)
    found = judge.read([text_of("boo")])
    start = ours.tokenizer.apply_chat_template(
        [{"role": "user", "content": text_of("boo")}], add_generation_prompt=True,
        return_dict=True)["input_ids"]
    ids = [ours.tokenizer.convert_tokens_to_ids(d) for d in "0123456789"]
    first = theirs_next(theirs, start)
    wanted = np.zeros(101)
    wanted[0] = first[ids[0]]
    for d in range(1, 10):
        second = theirs_next(theirs, [*start, ids[d]])[ids]
        wanted[d] = first[ids[d]] * (1 - second.sum())
        wanted[10 * d : 10 * d + 10] = first[ids[d]] * second
    third = theirs_next(theirs, [*start, ids[1], ids[0]])[ids]
    wanted[100] = wanted[10] * third[0]
    wanted[10] *= 1 - third.sum()
    np.testing.assert_allclose(found.probabilities[0] * found.mass[0], wanted, atol=1e-6)
    assert found.expected[0] == pytest.approx(wanted @ np.arange(101) / wanted.sum(), rel=1e-4)
    assert found.refusal[0] == pytest.approx(
        first[ours.tokenizer.convert_tokens_to_ids(REFUSAL[0])], abs=1e-4)
    monkeypatch.setattr(digits, "LEAST_BRANCH", 0.02)  # branches that are left out cost little
    short = judge.read([text_of("boo")])
    assert short.mass[0] == pytest.approx(wanted.sum(), abs=0.02)


class Steered:
    """`next_logprobs` of a model that wants to write certain texts, by the text so far."""

    def __init__(self, tokenizer, wishes):
        self.tokenizer, self.wishes, self.calls = tokenizer, wishes, []

    def __call__(self, model, prompts, candidates, batch_tokens=None):
        self.calls.append((len(prompts), batch_tokens))
        names = self.tokenizer.convert_ids_to_tokens(list(candidates))
        found = np.full((len(prompts), len(candidates)), 1e-9)
        for i, prompt in enumerate(prompts):
            tokens = getattr(prompt, "tokens", prompt)
            text = self.tokenizer.decode(list(tokens)).split("assistant\n")[-1]
            for name, p in self.wishes.get(text, {}).items():
                if name in names:
                    found[i, names.index(name)] = p
        return np.log(found)


@pytest.mark.parametrize(("wishes", "score", "expected", "mass"), [
    ({"": {"5": 0.9}, "5": {"7": 1.0}}, 57, 57.0, 0.9),
    ({"": {"5": 0.6, "8": 0.2}, "5": {"7": 0.25}}, 5, (45 * 0.05 + 15 * 0.57 + 16) / 8, 0.8),
    ({"": {"1": 1.0}, "1": {"0": 1.0}, "10": {"0": 1.0}}, 100, 100.0, 1.0),
    ({"": {"1": 1.0}, "1": {"0": 1.0}, "10": {"0": 0.4}}, 10, 46.0, 1.0),
    # 105 is no score, so it counts for neither 10 nor 100
    ({"": {"1": 1.0}, "1": {"0": 1.0}, "10": {"0": 0.1, "5": 0.5}}, 10, 28.0, 0.5),
    ({"": {"0": 0.3, "R": 0.2}}, 0, 0.0, 0.3),
    ({"": {"0": 0.3, "R": 0.6}}, None, None, 0.3),  # a refusal
    ({"": {"0": 0.2}}, None, None, 0.2),  # too little
])
def test_the_greedy_integer_the_expected_one_and_refusals(model, monkeypatch, wishes, score,
                                                         expected, mass):
    monkeypatch.setattr(digits, "next_logprobs", Steered(model.tokenizer, wishes))
    [verdict] = in_order(DigitJudge(model, rubric=TRAITS), items("boo"))
    assert verdict.score == score and verdict.mass == pytest.approx(mass, abs=1e-4)
    assert verdict.refused == (wishes[""].get("R", 0) > mass)
    if expected is None:
        assert verdict.expected is None
    elif score != 5:
        assert verdict.expected == pytest.approx(expected, abs=1e-3)
    else:  # 5 with 0.45, 57 with 0.15, 8 with 0.2
        assert verdict.expected == pytest.approx((5 * 0.45 + 57 * 0.15 + 8 * 0.2) / 0.8, abs=1e-3)


def test_only_probable_prefixes_and_the_greedy_one_are_continued(model, monkeypatch):
    """The others count as the number that they spell."""
    wishes = {"": {"5": 9e-4, "8": 1e-4}, "5": {"7": 1.0}, "8": {"3": 1.0}}
    monkeypatch.setattr(digits, "next_logprobs", Steered(model.tokenizer, wishes))
    found = DigitJudge(model, rubric=TRAITS).read([text_of("boo")])
    assert found.greedy.tolist() == [57] and found.mass[0] == pytest.approx(1e-3, abs=1e-6)
    np.testing.assert_allclose(found.probabilities[0, [5, 57, 8, 83]], [0, 0.9, 0.1, 0], atol=1e-3)


def test_a_zero_on_the_scale_of_roles_is_a_refusal(model, monkeypatch):
    steered = Steered(model.tokenizer, {"": {"0": 0.6, "2": 0.3}})
    monkeypatch.setattr(digits, "next_logprobs", steered)
    judge = DigitJudge(model, batch_tokens=99)
    [verdict] = judge.score(items("boo"))
    assert verdict.score == 0 and verdict.refused and steered.calls == [(1, 99)]
    assert verdict.raw == "0: 0.667, 2: 0.333, 1: 0.000, 3: 0.000"
    assert judge.name == f"{DigitJudge(model).name} batch 99"
    wide = DigitJudge(model, rubric=Rubric((0, 1, 2, 3, 4, 5), "{question} {answer}"))
    assert wide._verdicts(items("boo"), wide.read(["x"])).__next__().raw.count(":") == 4


def test_items_are_scored_in_groups_up_to_the_longest_that_fits(model, monkeypatch):
    """A score of up to three tokens must fit behind a prompt."""
    steered = Steered(model.tokenizer, {"": {"2": 0.9}})
    monkeypatch.setattr(digits, "next_logprobs", steered)
    monkeypatch.setattr(digits, "_ITEMS", 2)
    size = jp.encode(model, [text_of("")]).tokens.shape[1]
    fits, full = ("x" * (model.config.max_context - room - int(size)) for room in (4, 3))
    found = list(DigitJudge(model).score(items("a", fits, full, "b", "c")))
    assert {v.key: v.score for v in found} == {"q0": 2, "q1": 2, "q2": None, "q3": 2, "q4": 2}
    assert [v.key for v in found if v.error] == ["q2"]
    assert [count for count, _ in steered.calls] == [2, 1, 1]


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
    found = DigitJudge(wide).read([text_of("boo")])
    ids = [model.tokenizer.convert_tokens_to_ids(d) for d in "0123"]
    row = jp.encode(model, [text_of("boo")])
    _, logits = s.residuals(model, row)
    last = softmax(logits[0, int(row.length[0]) - 1].astype(np.float64))
    each = np.array([last[ids[0]], last[ids[1]], last[[ids[2], 70, 71]].sum(),
                     last[[ids[3], 72]].sum()])
    assert found.mass[0] == pytest.approx(each.sum(), rel=1e-4)
    np.testing.assert_allclose(found.probabilities[0], each / each.sum(), rtol=1e-4)


def test_a_score_needs_mass_on_the_digits():
    even = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]])
    found = Readings((0, 1, 2, 3), even, np.array([LEAST_MASS, 0.9, LEAST_MASS - 1e-9]),
                     np.zeros(3), even.argmax(-1))
    assert found.scores == [3, 0, None]
    np.testing.assert_allclose(found.expected, [2.0, 0.6, 0.6])


def test_it_is_a_judge(model):
    judge = DigitJudge(model)
    asked = items("boo", "no")
    found = in_order(judge, asked)
    read = judge.read([text_of("boo"), text_of("no")])
    assert [v.score for v in found] == read.scores
    np.testing.assert_allclose([v.mass for v in found], read.mass)
    assert in_order(judge, []) == [] and model.fingerprint in judge.name
    other = DigitJudge(model, rubric=Rubric(template="{question}{answer}"))
    assert other.name != judge.name and judge.reads_eval_prompt and not other.reads_eval_prompt


def test_a_prompt_that_fills_the_context_is_an_error_of_its_item(model):
    found = in_order(DigitJudge(model), items("boo", "x" * 600))
    assert found[0].error is None and "context of 512 tokens" in found[1].error


def test_what_it_needs_is_said(model):
    with pytest.raises(jp.UserError, match="has no tokenizer"):
        DigitJudge(s.tiny_model())
    bare = dataclasses.replace(ROLE, eval_prompt="")
    with pytest.raises(jp.UserError, match="'ghost' has no eval_prompt"):
        in_order(DigitJudge(model), [Item("q", bare, "Who?", "boo")])

    class WithoutDigits:
        def get_vocab(self):
            return {"0": 5, "1": 6, "3": 7}

    with pytest.raises(jp.UserError, match="no token for the digit 2"):
        DigitJudge(dataclasses.replace(model, tokenizer=WithoutDigits()))


def test_a_judge_may_be_loaded_after_the_evaluated_model_is_released(checkpoint):
    """Its identity is known before; the weights of the first model are gone when it loads."""
    target, order = jp.load(str(checkpoint)), []

    def load():
        order.append(target.params.like.is_deleted())
        return jp.load("mini")

    judge = DigitJudge(lambda: (release(target), load())[1])
    checked = load()
    judge.identify(checked)
    assert judge.name == DigitJudge(checked).name and judge.after and order == [False]
    found = in_order(judge, items("boo"))
    assert order == [False, True] and not judge.after
    assert found == in_order(DigitJudge(checked), items("boo"))
    assert target.name == str(checkpoint) and target.config.n_layers == 3
    changed = DigitJudge(lambda: jp.load(str(checkpoint)))
    changed.identify(checked)
    with pytest.raises(jp.UserError, match="the model of the judge changed"):
        in_order(changed, items("boo"))


def test_the_judge_self_reads_what_the_model_writes(model, monkeypatch):
    class Said:
        text = ["Grade: 2", "no idea"]

    monkeypatch.setattr("jaxpersona.engine.generate.generate", lambda *_, **__: Said)
    judge = SelfJudge(model)
    found = in_order(judge, items("boo", "no"))
    assert [v.score for v in found] == [2, None] and found[1].raw == "no idea"
    assert judge.name.startswith(f"self {model.fingerprint}") and in_order(judge, []) == []


@pytest.mark.parametrize("more", [
    ["--judge-after"], pytest.param([], marks=pytest.mark.slow)], ids=["after", "beside"])
def test_the_command_judges_with_another_model(tmp_path, monkeypatch, checkpoint, more):
    """`axis --judge model:mini` stores the scores that the judge gives to the run's rollouts."""
    monkeypatch.setattr(digits, "LEAST_MASS", 0.0)
    roles = [Role("default", ("",), ""), *(Role(name, (f"You are a {name}.",), "")
                                           for name in ("ghost", "baker"))]
    texts = s.write_texts(tmp_path, roles, [Question(i, f"Who {i}?") for i in range(3)])
    out = tmp_path / "out"
    command = s.axis_command(checkpoint, texts, out, "--judge", "model:mini", *more)
    assert s.run_command(command) in (0, 2)  # 2, if by chance too few replies have score 3
    run, judge = Run.read(out), DigitJudge(jp.load("mini"))
    assert run.judge == judge.name
    for name in ("ghost", "baker"):
        found = judge.read([f"{r['question']} {r['conversation'][-1]['content']}?"
                            for r in run.rollouts(name)])
        assert list(run.scores(name).values()) == found.scores
