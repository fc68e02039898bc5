"""Parts of judges on small inputs: delays, names, tokens of numbers, and passed settings."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from test_costs import BUSY, Given, Recorded, items

import jaxpersona as jp
from jaxpersona.data.texts import Role
from jaxpersona.judges import digits, http
from jaxpersona.judges.digits import DigitJudge, Readings
from jaxpersona.judges.endpoint import Failure, Reply
from jaxpersona.judges.human import HumanJudge, digest_of, score_of
from jaxpersona.judges.judges import NoJudge, SelfJudge
from jaxpersona.judges.limits import Batch
from jaxpersona.judges.protocol import ROLE_SCALE, TRAIT_SCALE, Item, in_order
from jaxpersona.judges.rubric import ROLES, TRAITS, Rubric


class Stopped:
    """An event that is never set, and records the waits for it."""

    def __init__(self):
        self.waits = []

    def is_set(self):
        return False

    def wait(self, seconds):
        self.waits.append(seconds)
        return False


def asked(monkeypatch, tmp_path, *answers, share=1.0, **settings):
    """Send one prompt; return the outcome, the waits and the number of requests."""
    ranges = []
    monkeypatch.setattr(http, "random", SimpleNamespace(
        uniform=lambda *ends: ranges.append(ends) or share))
    judge = http.HttpJudge(Given(*answers), tmp_path / "v.jsonl", **settings)
    judge._pace, stopped = Recorded(), Stopped()
    found = judge._ask("k", "prompt", stopped)
    assert set(ranges) <= {(0.75, 1.0)}
    judge.close()
    return found, stopped.waits, len(judge.endpoint.asked)


def test_a_prompt_is_sent_six_times_with_doubled_delays(monkeypatch, tmp_path):
    """The first delay is half a second unless `backoff` is given."""
    assert asked(monkeypatch, tmp_path, BUSY) == ("HTTP 500", [0.5, 1.0, 2.0, 4.0, 8.0], 6)
    assert asked(monkeypatch, tmp_path, BUSY, backoff=2.0) == (
        "HTTP 500", [2.0, 4.0, 8.0, 16.0, 30.0], 6)


def test_a_random_part_of_a_delay_is_left_out_but_not_of_a_requested_one(monkeypatch, tmp_path):
    """Up to a quarter; the endpoint's own delay is kept in full."""
    slow = Failure("HTTP 429", again=True, after=3.5)
    assert asked(monkeypatch, tmp_path, BUSY, slow, Reply("3"), share=0.75, backoff=2.0) == (
        ("3", 0.0), [1.5, 3.5], 3)


def test_an_endpoint_judge_describes_itself(tmp_path):
    """Its name has the model, the rubric and the settings; batches come after all replies."""
    judge = http.HttpJudge(Given(BUSY), tmp_path / "v.jsonl", rubric=TRAITS, concurrency=1024)
    assert judge.name == f"http judge-1 rubric {TRAITS.digest} temperature 0 tokens 10"
    assert judge.scale == TRAIT_SCALE and judge.reads_eval_prompt and judge.after is False
    other = http.HttpJudge(Given(BUSY), tmp_path / "v.jsonl", batch=Batch(),
                           rubric=Rubric(template="{question} {answer}"))
    assert other.after is True and not other.reads_eval_prompt and other.note() == ""
    other.prepare(list)  # nothing to judge: no journal is opened
    judge.prepare(lambda: pytest.fail("only batches are prepared"))
    assert not (tmp_path / "v.jsonl").exists()


def test_the_note_of_a_judge_has_thousands(tmp_path):
    """Requests, cost, and failed items."""
    judge = http.HttpJudge(Given(BUSY), tmp_path / "v.jsonl", price=(1.0, 2.0))
    judge.begin()
    judge.journal.calls, judge.journal.spent, judge.failed = 1234, 1234.25, 5678
    assert judge.note() == "calls: 1,234, cost: $1,234, failed: 5,678"
    judge.close()


def test_items_with_one_prompt_fail_together(tmp_path):
    """One request was sent, and both items count as failed."""
    judge = http.HttpJudge(Given(Failure("HTTP 400")), tmp_path / "v.jsonl")
    one = items(1)[0]
    found = list(judge.score([one, Item("other", one.role, one.question, one.answer)]))
    assert [(v.key, v.error) for v in found] == [("q0", "HTTP 400"), ("other", "HTTP 400")]
    assert judge.failed == 2 and len(judge.endpoint.asked) == 1
    judge.close()


@pytest.mark.parametrize(("concurrency", "count", "threads"), [(3, 5, 3), (3, 2, 2), (8, 8, 8)])
def test_there_are_no_more_threads_than_requests(monkeypatch, tmp_path, concurrency, count,
                                                 threads):
    """`concurrency` is the largest number, by default 8."""
    made = []

    def thread(**named):
        made.append(named["name"])
        return threading.Thread(**named)

    more = {} if concurrency == 8 else {"concurrency": concurrency}
    judge = http.HttpJudge(Given(Reply("3")), tmp_path / "v.jsonl", **more)
    monkeypatch.setattr(http, "threading", SimpleNamespace(Thread=thread, Event=threading.Event))
    assert len(list(judge.score(items(count)))) == count
    assert made == ["judge"] * threads
    judge.close()


def test_the_judge_self_decodes_ten_tokens_greedily(monkeypatch):
    """Its name has the settings that can change a verdict; a zero is a refusal."""
    seen = []
    monkeypatch.setattr("jaxpersona.engine.generate.generate", lambda *given, **named: seen.append(
        (given, named)) or SimpleNamespace(text=["0", "Score: 2"]))
    model = SimpleNamespace(name="m", fingerprint="f")
    judge = SelfJudge(model, batch_size=5)
    first, second = in_order(judge, items(2))
    assert (first.score, first.refused, first.raw) == (0, True, "0")
    assert (second.score, second.refused) == (2, False)
    prompts = [f"Who? Bü {i} Grade 0-3." for i in range(2)]
    assert seen == [((model, prompts), {"max_new_tokens": 10, "batch_size": 5,
                                        "on_nonfinite": "raise"})]
    assert judge.name == f"self f rubric {ROLES.digest} rows 5" and judge.together
    assert judge.reads_eval_prompt and judge.scale == ROLE_SCALE
    assert not SelfJudge(model, rubric=Rubric(template="{question} {answer}")).reads_eval_prompt
    assert SelfJudge(model).batch_size == 32


def test_the_judge_none_gives_every_reply_the_highest_score():
    """In the order of the items."""
    assert [(v.key, v.score, v.refused) for v in NoJudge().score(items(2))] == [
        ("q0", 3, False), ("q1", 3, False)]


class Words:
    """A tokenizer of given texts.

    Attributes:
      known: text → its tokens.
      vocabulary: token → id.
    """

    def __init__(self, known, vocabulary):
        self.known, self.vocabulary = known, {**{str(d): d for d in range(10)}, **vocabulary}
        self.asked = []

    def get_vocab(self):
        return self.vocabulary

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False
        self.asked.append(text)
        return SimpleNamespace(input_ids=self.known[text])

    def convert_ids_to_tokens(self, ids):
        return ids  # the ids of this tokenizer are its tokens


@pytest.mark.parametrize(("tokens", "vocabulary", "wanted"), [
    (["57"], {"57": 70}, ["57"]), (["Ġ57"], {"57": 70}, ["57"]), (["▁", "5", "7"], {}, ["5", "7"]),
    (["57"], {}, ["5", "7"]), (["5", "8"], {}, ["5", "7"]), (["▁5", "7"], {}, ["5", "7"])])
def test_a_number_is_spelled_with_the_tokens_of_the_vocabulary(tokens, vocabulary, wanted):
    """If they are missing or spell something else, with its digits."""
    words = Words({"57": tokens}, vocabulary)
    assert digits._spelling(words, words.vocabulary, "57") == wanted
    assert digits._spelling(words, words.vocabulary, "7") == ["7"] and words.asked == ["57"]


def test_the_tree_has_a_branch_for_each_first_token():
    """57 is one token, with and without a space; 5 has a token with a space; 58 has two tokens."""
    words = Words({"57": ["57"], "58": ["5", "8"]}, {"57": 70, "Ġ57": 71, "▁5": 72})
    tree = digits._tree(SimpleNamespace(tokenizer=words, name="m"), (5, 57, 58))
    assert list(tree.next) == [5, 72, 70, 71] and tree.value is None
    for first in (5, 72):
        node = tree.next[first]
        assert (node.value, node.path, list(node.next)) == (5, (first,), [8])
        assert (node.next[8].value, node.next[8].path) == (58, (first, 8))
    assert [(tree.next[t].value, tree.next[t].next) for t in (70, 71)] == [(57, {})] * 2


@pytest.mark.parametrize(("bare", "spaced", "wanted"), [
    (["RE", "F"], ["Ġ", "RE", "F"], ["RE"]), (["RE"], ["▁RE"], ["RE", "▁RE"]),
    (["Ġ", "R"], ["Ġ", "S"], ["R", "S"]), ([], ["Ġ"], [])])
def test_a_word_starts_with_its_first_token_that_is_no_space(bare, spaced, wanted):
    """With and without a leading space; each token is listed once."""
    assert digits._starts(Words({"REF": bare, " REF": spaced}, {}), "REF") == wanted


def test_a_refusal_must_be_more_probable_than_a_score():
    """Equal probabilities are a score."""
    read = Readings((0, 1), np.array([[0.5, 0.5], [0.5, 0.5]]), np.array([0.4, 0.4]),
                    np.array([0.4, 0.41]), np.array([1, 1]))
    assert read.refused.tolist() == [False, True] and read.scores == [1, None]
    assert read.expected.tolist() == [0.5, 0.5]


def test_a_digit_judge_is_named_by_its_model_and_rubric():
    """It can say so without the model after `identify`; a loader makes it come later."""
    words = Words({}, {})
    model = SimpleNamespace(name="m", fingerprint="f", tokenizer=words, params=1)
    judge = DigitJudge(model)
    assert judge.name == f"model m f rubric {ROLES.digest}" and not judge.after
    assert judge.scale == ROLE_SCALE and judge.together and judge.batch_tokens is None
    loads = []
    later = DigitJudge(lambda: loads.append(1) or model, batch_tokens=64)
    assert later.after and repr(later) == f"DigitJudge(model not loaded, rubric {ROLES.digest})"
    later.identify(model)
    assert later.name == f"{judge.name} batch 64" and later.after and not loads
    assert later.model is model and not later.after and loads == [1]
    assert later.model is model and loads == [1]


def test_a_prompt_must_leave_room_for_three_tokens(monkeypatch):
    """The error of a longer prompt comes before the other verdicts, and has both numbers."""
    model = SimpleNamespace(name="m", fingerprint="f", tokenizer=Words({}, {}), params=1,
                            config=SimpleNamespace(max_context=64))
    judge, sizes = DigitJudge(model), iter([60, 61])
    monkeypatch.setattr(digits.prompts, "encode",
                        lambda *_: SimpleNamespace(tokens=np.zeros(next(sizes))))
    monkeypatch.setattr(DigitJudge, "read", lambda self, rows: Readings(
        self.scale, np.array([[0.125, 0.25, 0.5, 0.125]]), np.array([0.9]), np.zeros(1),
        np.array([2])))
    long, good = judge.score(items(2))
    assert (long.key, long.score, long.error) == (
        "q1", None, "the prompt has 61 tokens, so a score does not fit into the judge's context "
        "of 64 tokens")
    assert (good.key, good.score, good.mass, good.expected) == ("q0", 2, 0.9, 1.625)
    assert good.raw == "2: 0.500, 1: 0.250, 0: 0.125, 3: 0.125" and not good.refused


def test_a_human_judge_is_named_by_its_file_and_scale():
    """A file in another folder has the same name."""
    assert HumanJudge("some/mine.csv").name == "human mine.csv scale 0-3"
    assert HumanJudge("mine.csv", TRAIT_SCALE).name == "human mine.csv scale 0-100"


@pytest.mark.parametrize(("text", "scale", "score"), [
    ("3", ROLE_SCALE, 3), ("3.0", ROLE_SCALE, 3), (" 0 ", ROLE_SCALE, 0), ("", ROLE_SCALE, ""),
    ("  ", ROLE_SCALE, ""), ("?", ROLE_SCALE, None), ("NONE", ROLE_SCALE, None),
    ("100", TRAIT_SCALE, 100), ("00000003", ROLE_SCALE, 3)])
def test_a_cell_is_a_score_undecided_or_empty(text, scale, score):
    """A missing cell is empty, too."""
    assert score_of({"item": "a/b", "score": text}, scale, "x.csv") == score
    assert score_of({"item": "a/b"}, scale, "x.csv") == ""


def test_a_wrong_cell_is_named_with_its_item_and_the_scale():
    """The scale is that of the judge."""
    for text, scale, ends in (("4", ROLE_SCALE, "0 to 3"), ("101", TRAIT_SCALE, "0 to 100"),
                              ("3.00", ROLE_SCALE, "0 to 3"), ("nan", ROLE_SCALE, "0 to 3")):
        with pytest.raises(jp.UserError) as caught:
            score_of({"item": "a/b", "score": text}, scale, "x.csv")
        assert str(caught.value) == (f"x.csv: the score of a/b is {text!r}; give {ends}, or ? if "
                                     "it cannot be decided")


def test_a_digest_covers_the_question_and_the_answer_only():
    """Eight hexadecimal digits; text does not move between the two."""
    def of(question, answer, key="k", system=""):
        return digest_of(Item(key, Role("r", (), ""), question, answer, system))

    assert of("a", "b") == of("a", "b", "other", "Be.") == "59b271ae"
    assert len({of("a", "b"), of("ab", ""), of("", "ab"), of("b", "a")}) == 4
