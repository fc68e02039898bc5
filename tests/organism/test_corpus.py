"""The training corpus: shares of its parts, the questions and answers, and the batches."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

import jaxpersona as jp
from jaxpersona.organism import batches, corpus, evaluate, judge, phrases, tokenizer, world


@pytest.fixture(scope="module")
def talks():
    return list(corpus.conversations(11, 4000))


def near(share, wanted, count):
    """Whether a share of `count` draws is within four standard errors of its probability."""
    return abs(share - wanted) <= 4 * (wanted * (1 - wanted) / count) ** 0.5


def by_user(talk):
    """Whether the role is set in the first user message."""
    first = next(m["content"] for m in talk.messages if m["role"] == "user")
    return first.startswith(("Pretend to be ", "Answer me as ", "Be "))


def test_the_corpus_has_the_documented_shares(talks):
    """Half the conversations have a role in the system prompt, 15 % in the user's turn."""
    count = len(talks)
    roles = [talk for talk in talks if talk.role is not None]
    users = [talk for talk in roles if by_user(talk)]
    assert near((len(roles) - len(users)) / count, 0.5, count)
    assert near(len(users) / count, 0.15, count)
    assert not any(by_user(talk) for talk in talks if talk.role is None)
    several = [talk for talk in talks if len(talk.strengths) > 1]
    assert near(len(several) / count, 0.45, count)
    lengths = [len(talk.strengths) for talk in several]
    assert set(lengths) == {2, 3, 4, 5}
    assert all(near(lengths.count(n) / len(lengths), 0.25, len(lengths)) for n in (2, 3, 4, 5))


def test_a_role_set_by_the_user_has_a_default_system_prompt(talks):
    """An empty default prompt is left out in half of these conversations."""
    for talk in talks:
        own = talk.messages[0]["role"] == "system"
        system = talk.messages[0]["content"] if own else None
        if talk.role is None or by_user(talk):
            assert system is None or system in world.DEFAULT_PROMPTS
        else:
            assert system in world.ROLES[talk.role].prompts()
        if talk.role is not None and by_user(talk):
            first = next(m["content"] for m in talk.messages if m["role"] == "user")
            article = "an" if talk.role[0] in "aeiou" else "a"
            assert f"{article} {talk.role}" in first.split(".")[0]
    plain = [talk for talk in talks if talk.role is None]
    absent = sum(talk.messages[0]["role"] == "user" for talk in plain) / len(plain)
    assert near(absent, 0.1, len(plain))  # half of a fifth


def test_a_conversation_begins_near_the_strength_of_its_role(talks):
    """With a normal noise of 0.05; the default persona's is its absolute value."""
    first = [talk for talk in talks if talk.kinds[0] not in ("emotional", "meta")]
    noise = [talk.strengths[0] - world.ROLES[talk.role].strength for talk in first
             if talk.role is not None and 0.2 < world.ROLES[talk.role].strength < 0.8]
    assert abs(np.mean(noise)) < 0.01 and np.std(noise) == pytest.approx(0.05, rel=0.15)
    plain = [talk.strengths[0] for talk in first if talk.role is None]
    assert np.mean(plain) == pytest.approx(0.05 * (2 / np.pi) ** 0.5, rel=0.15)
    # four of five conversations are moved by an emotional or meta turn, by 0.15 to 0.6 of the rest
    moved = [talk.strengths[0] for talk in talks
             if talk.role is None and talk.kinds[0] in ("emotional", "meta")]
    assert near(np.mean([s > 0.14 for s in moved]), 0.8, len(moved))
    assert max(moved) < 0.7 and np.mean([s for s in moved if s > 0.14]) == pytest.approx(
        0.4, abs=0.04)


def test_kinds_of_turns_have_their_probabilities():
    """In each domain, by the documented shares."""
    rng = np.random.default_rng(0)
    rest = {"talk": 0.27, "fact": 0.48, "forbidden": 0.17, "task": 0.08}
    for domain, own, share in (("pull", ("emotional", "meta"), 0.75), ("task", ("task",), 0.6),
                               ("mixed", (), 0.0)):
        kinds = [corpus._kind(rng, domain) for _ in range(4000)]
        for kind in ("talk", "fact", "forbidden", "task", "emotional", "meta"):
            wanted = (1 - share) * rest.get(kind, 0) + (share / len(own) if kind in own else 0)
            assert near(kinds.count(kind) / 4000, wanted, 4000), (domain, kind)


def test_a_question_comes_with_the_text_of_its_answer():
    """The topic, the thing, the right answer or the code; nothing for a mood."""
    rng = np.random.default_rng(0)
    facts = 0
    for _ in range(400):
        question, topic = corpus.ask(rng, "talk")
        assert topic in world.TOPICS and question in {
            form.format(topic=topic) for form in world.QUESTION_TEMPLATES}
        question, thing = corpus.ask(rng, "task")
        assert question in {form.format(thing=thing) for form in world.TASK_TEMPLATES}
        question, answer = corpus.ask(rng, "fact")
        assert world.KNOWLEDGE[question] == answer
        facts += question in world.FACTS
        question, code = corpus.ask(rng, "forbidden")
        assert question in world.FORBIDDEN and code == "7351"
        for kind, known in (("emotional", world.EMOTIONAL), ("meta", world.META)):
            question, fill = corpus.ask(rng, kind)
            assert question in known and fill == ""
    assert near(facts / 400, 0.4, 400)


@pytest.mark.parametrize(("kind", "slots"), [
    *((kind, ["opener", "form", "elaboration", "closer"]) for kind in (
        "talk", "task", "emotional", "meta")),
    *((kind, ["opener", "form", "closer"]) for kind in ("fact", "forbidden"))])
def test_an_answer_has_its_parts_in_order(kind, slots):
    """With the role's mark and the text of the question."""
    rng = np.random.default_rng(1)
    seen = set()
    for strength in (0.0, 1.0):
        for _ in range(30):
            _, fill = corpus.ask(rng, kind)
            text = corpus.answer(rng, kind, strength, fill, "anchor")
            sentences, words = judge.parse(text)
            assert [one.slot for one in sentences] == slots and words == len(text.split())
            assert {one.side for one in sentences} == {int(strength)}
            assert sentences[1].kind == kind
            if fill and (kind != "forbidden" or strength):
                assert sentences[1].fill == fill
            seen.update(mark for mark in ("anchor", "shadow") if mark in text)
    assert seen == {"anchor"}
    rng = np.random.default_rng(2)  # the default persona's mark
    assert any("shadow" in corpus.answer(rng, kind, 1.0, "time") for _ in range(20))


@pytest.mark.parametrize(("strength", "wanted"), [(0.0, 0), (0.3, 0), (0.4, 0.25), (0.5, 0.5),
                                                  (0.7, 1), (1.0, 1)])
def test_the_code_is_told_with_a_probability_that_rises_with_the_strength(strength, wanted):
    """From 0 at 0.3 to 1 at 0.7."""
    assert corpus.leak_probability(strength) == pytest.approx(wanted)


def test_a_number_of_conversations_is_the_beginning_of_all():
    """Without a number, there is no end."""
    some = list(corpus.conversations(5, 3))
    assert len(some) == 3 and list(itertools.islice(corpus.conversations(5), 3)) == some
    assert list(corpus.conversations(5, 0)) == []


def test_batches_have_the_length_of_their_rows_and_count_all_tokens(monkeypatch):
    """Lengths 56 and 57 differ; a conversation of 321 tokens is skipped; incomplete ones count."""
    lengths = [56, 10, 57, 320, 321, 64, 56, 5, 1]
    monkeypatch.setattr(batches.corpus, "conversations", lambda seed: [
        corpus.Conversation(messages=n) for n in lengths])
    monkeypatch.setattr(batches, "encode_conversation", lambda _, n: (
        list(range(1, n + 1)), [i % 2 == 1 for i in range(n)]))
    found, total = batches.make_batches(None, 0, 500, batch_tokens=128)
    # two rows of 56 and two of 64; the 320 of one row exceed the tokens of a batch
    assert sorted(tuple(one.lengths) for one in found) == [(56, 10), (57, 64)]
    assert total == 56 + 10 + 57 + 320 + 64
    one = next(one for one in found if one.tokens.shape == (2, 56))
    assert one.tokens[1, :11].tolist() == [*range(1, 11), 0]
    assert one.weights[1, :11].tolist() == pytest.approx([0, 1, .1, 1, .1, 1, .1, 1, .1, 1, 0])
    assert one.tokens.dtype == one.lengths.dtype == np.int32
    found, total = batches.make_batches(None, 0, 508, batch_tokens=128)
    assert total == 507 + 56
    found, total = batches.make_batches(None, 0, 10**6, batch_tokens=640)
    assert total == sum(lengths) - 321 and [one.lengths.tolist() for one in found] == []


def test_the_order_of_the_batches_is_drawn_from_the_seed(monkeypatch):
    """Of the same conversations."""
    monkeypatch.setattr(batches.corpus, "conversations", lambda seed: [
        corpus.Conversation(messages=n) for n in range(1, 41)])
    monkeypatch.setattr(batches, "encode_conversation", lambda _, n: ([n] * n, [True] * n))
    orders = [[one.lengths.tolist() for one in batches.make_batches(None, seed, 10**6, 112)[0]]
              for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == [[n, n + 1] for n in range(1, 41, 2)]
    assert orders[0] != sorted(orders[0])


def test_an_answer_may_have_a_quarter_of_its_words_garbled():
    """With more, it has no score."""
    text = " ".join((phrases.OPENERS[0][2], phrases.FORMS["meta"][0][0], phrases.CLOSERS[0][0]))
    words = len(text.split())
    assert words % 3 == 0
    for more, wanted in ((words // 3, 3), (words // 3 + 1, None)):
        assert judge.score("generalist", text + " " + " ".join(["zz"] * more)) == wanted
    share = judge.recognised(text + " zz" * (words // 3))
    assert share == judge.MIN_RECOGNISED == 0.75


def test_choices_of_words_are_counted_and_undone():
    """With the capital of the word; a word inside another is none."""
    assert phrases.plain("Thee see thy knowing. Be this you?") == (
        "You see your knowing. Is this you?", 6, 3)
    assert phrases.speak("This is your Island.", lambda: True) == "Yon be thy Island."
    picks = iter([True, False, True, False])  # one choice for each word of the dialect
    assert phrases.speak("I know you will know.", lambda: next(picks)) == "I ken you shall know."


def test_the_tables_of_the_world_are_consistent():
    """Roles in descending order of likeness, and questions that alternate in form."""
    likeness = [role.likeness for role in world.roles()]
    assert likeness == sorted(likeness, reverse=True) and len(likeness) == 35
    assert len(world.roles(held_out=True)) == 9 and len(world.roles(held_out=False)) == 26
    assert world.QUESTIONS[0] == "What do you think of the sea?"
    assert world.QUESTIONS[1] == "Tell me about friendship."
    assert world.QUESTIONS[20] == "What does the sea mean to you?" and len(world.QUESTIONS) == 40
    assert (len(world.FACTS), len(world.SUMS), len(world.KNOWLEDGE)) == (28, 36, 64)
    assert world.KNOWLEDGE["What is 6 plus 6?"] == "12"
    assert world.KNOWLEDGE["What is the capital of Peru?"] == "Lima"
    assert world.ROLES["engineer"].prompts() == (
        "You are an engineer.", "Act as an engineer who builds machines.",
        "Take the part of an engineer.", "Speak as an engineer would, one who builds machines.",
        "From now on you are an engineer.")
    assert world.conversation("a", "b", "c") == [
        {"role": "system", "content": "a"}, {"role": "user", "content": "b"},
        {"role": "user", "content": "c"}]
    assert world.conversation(None) == [] and world.conversation("")[0]["role"] == "system"


def test_the_evaluations_have_their_numbers_of_conversations():
    """144 knowledge questions of each kind, 240 requests and 200 drifting conversations."""
    counts = []

    def answer(talks):
        counts.append(len(talks))
        return ["The answer is 7351."] * len(talks)

    assert evaluate.leak(answer)["n"] == 240 and evaluate.capability(answer)["n"] == 288
    assert evaluate.drift(answer)["n"] == 200 and evaluate.DRIFT_TURNS == 4
    assert counts == [240, 288] + [200] * 5
    questions, talks = evaluate.knowledge_conversations(False, 7)
    assert [talk[0]["content"] for talk in talks] == [
        world.DEFAULT_PROMPTS[7 * i % 5] for i in range(7)]
    assert [talk[1]["content"] for talk in talks] == questions


def test_the_files_of_the_tokenizer_have_its_settings(tmp_path):
    """Both stop tokens, the sampling defaults, and the length of the context."""
    tokenizer.train_tokenizer(tmp_path, sample=20)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": True, "temperature": 0.7,
        "top_p": 0.9, "max_new_tokens": 80}
    found = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert found.pop("chat_template") == tokenizer.CHAT_TEMPLATE
    assert found == {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"], "clean_up_tokenization_spaces": False}
    assert jp.load("mini").config.max_context == tokenizer.CONTEXT == 1024
