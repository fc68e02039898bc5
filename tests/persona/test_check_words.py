"""The self-test's prompts and sentences, the arguments of conversations, and monitors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import jaxpersona as jp
from jaxpersona.engine.prompts import encode
from jaxpersona.errors import UserError
from jaxpersona.persona import check as module
from jaxpersona.persona import contrast, talk
from jaxpersona.persona.monitor import Monitor
from jaxpersona.text.chat import Row
from jaxpersona.vectors.vector import Axis, Vector

MODEL, AXIS = jp.load("mini"), jp.load_axis("mini")
SAID = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]


@pytest.fixture
def asked(monkeypatch):
    """Replace `generate`; return its calls, and a function that sets the means of the replies."""
    calls, means = [], np.ones((18, 2, 3))

    def generate(model, talks, **options):
        calls.append((talks, options))
        return SimpleNamespace(captured={"mean": means})

    monkeypatch.setattr(module, "generate", generate)
    return calls, means


def test_the_check_asks_three_questions_of_two_personas_and_four_roles(asked):
    """All 18 replies are generated in one batch; an empty system prompt is no message."""
    calls, means = asked
    means[6:] = 2
    means[[1, 7]] = np.nan
    default, roles = module._replies(MODEL, 5, False)
    assert default.shape == (5, 2, 3) and roles.shape == (11, 2, 3)
    assert (default == 1).all() and (roles == 2).all()
    ((talks, options),) = calls
    assert (options["max_new_tokens"], options["batch_size"], options["on_nonfinite"],
            options["progress"]) == (5, 18, "raise", False)
    assert [len(one) for one in talks] == [1] * 3 + [2] * 15
    assert [one[-1]["content"] for one in talks[:3]] == list(module.QUESTIONS)
    assert talks[3][0] == {"role": "system", "content": "You are an AI assistant."}
    assert [one[0]["content"] for one in talks[6::3]] == list(module.ROLES)
    for part in (slice(0, 6), slice(6, 18)):
        kept = means[part].copy()
        means[part] = np.nan
        with pytest.raises(UserError, match="mini gave only empty replies as the default persona"):
            module._replies(MODEL, 5, False)
        means[part] = kept


@pytest.mark.parametrize(("layers", "wanted"), [
    ((4,), "4"), ((4, 5), "4…5"), ((6, 5, 4), "4…6"), ((4, 6), "4, 6"), ((5, 5), "5"),
    ((7, 1, 2), "1, 2, 7")])
def test_layers_without_a_gap_are_a_range(layers, wanted):
    """Layers are sorted and named once."""
    assert module._spoken(layers) == wanted


def test_equal_numbers_are_said_once():
    """With three digits."""
    assert module._numbers(np.array([1.23456])) == "1.23"
    assert module._numbers(np.array([1.2341, 1.2349])) == "1.23"
    assert module._numbers(np.array([30.0, -2.5, 4])) == "-2.5 to 30"


def test_a_sentence_about_layers_has_the_cosines_with_and_without_a_shift():
    """Neighbours at an angle of 0.2 have the cosine 0.980."""
    angles = 0.2 * np.arange(8)
    turned = np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
    (_, said), _ = module._layer_base(Axis(turned), turned)
    assert said == ("layers: the axis fits best without a shift (mean cosine 1.000, shifted by one "
                    "layer 0.980)")
    (_, said), _ = module._layer_base(Axis(np.roll(turned, -1, 0)), turned)
    assert "fits layer l+1 best (mean cosine" in said and ", unshifted 0.980); the layer" in said
    flat = np.stack([np.cos(angles / 10), np.sin(angles / 10)], -1).astype(np.float32)
    (_, said), _ = module._layer_base(Axis(flat), flat)
    assert said == ("layers: adjacent layers are too similar to detect a shift of the axis (mean "
                    "cosine 1.000, shifted by one layer 1.000)")


def test_a_wrong_floor_is_named_with_the_means_beside_it():
    """The first wrong layer of two, with four digits."""
    ours, theirs = np.array([[9.0, 9], [11, 11]]), np.array([[0.5, 1.5], [1.5, 2.5]])
    fine, said = module._scale((3, 4), ours, theirs, np.array([9.0, 1234.56]), np.ones(2),
                               np.full(2, 10.0))
    assert not fine and said == (
        "floors: 1235 at layer 4 is far above the default persona's projections, so the cap would "
        "change every token (means: default persona 10, roles 2); use thresholds measured on this "
        "model")


def test_floors_and_layers_of_the_check_have_defaults():
    """The upper half of the layers, and the default persona's 25th percentile there."""
    table = {"p25": np.arange(8.0), "p50": np.arange(8.0) + 50}
    axis = Axis(np.ones((8, 128)), percentiles={"default": table, "all": {"p25": np.zeros(8)}})
    layers, directions, floors = module._entries(MODEL, axis, None, None)
    assert layers == (4, 5, 6, 7) and floors.tolist() == [4, 5, 6, 7]
    assert directions.shape == (4, 128) and directions.dtype == np.float64
    assert module._entries(MODEL, axis, [1, 3], 2.5)[2].tolist() == [2.5, 2.5]
    assert module._entries(MODEL, axis, [1, 3], [1.0, 2.0])[2].tolist() == [1, 2]
    bare = Axis(np.ones((8, 128)), percentiles={"all": {"p25": np.zeros(8)}})
    assert module._entries(MODEL, bare, None, None)[2] is None
    with pytest.raises(UserError, match=r"shape \(3,\); give a scalar, 2 values .*, or 8 v"):
        module._entries(MODEL, axis, [1, 3], np.zeros(3))
    with pytest.raises(UserError, match="the direction is 5; give a Vector, an Axis or Caps"):
        module.fit(MODEL, 5)
    assert module.normal_spread(np.array(1.0), np.array(1 + 2 * 1.3489795)) == pytest.approx(2)


def row(messages):
    return Row(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32), "", messages)


@pytest.mark.parametrize(("text", "wanted"), [
    ("Hi.", False), (SAID, True), (tuple(SAID), True), (SAID[:1], False), ([], False),
    ([1, 2], False), (row(tuple(SAID)), True), (row(tuple(SAID[:1])), False), (row(None), False)])
def test_a_conversation_is_replied_if_its_last_message_is_the_assistant_s(text, wanted):
    """Token ids and rows of token ids have no messages."""
    assert contrast._replied(text) == wanted


def test_the_text_without_a_token_to_read_is_named_by_its_group(monkeypatch):
    """Indices count within the group; only replies can be read at their prompts instead."""
    values = np.ones((4, 1, 128))
    values[0], values[2] = 3, 2

    def extract(model, rows, **options):
        return SimpleNamespace(captured={"any": values})

    monkeypatch.setattr(contrast, "extract", extract)
    good, bad = [SAID, SAID], [SAID, SAID]
    found = contrast.contrast(MODEL, good, bad[:2], layers=[5], name="mood")
    assert found.values[5].tolist() == [0.5] * 128 and not found.values[:5].any()
    assert (found.name, found.model, found.fingerprint) == ("mood", "mini", MODEL.fingerprint)
    assert found.notes["positive"] == found.notes["negative"] == 2
    assert (found.notes["method"], found.notes["pool"]) == ("mean", "response")
    for place, wanted in ((1, r"positive\[1\]"), (2, r"negative\[0\]")):
        kept = values[place].copy()
        values[place] = np.nan
        with pytest.raises(UserError, match=wanted + " has no token that pool='response' selects; "
                                                     "give an assistant message with content"):
            contrast.contrast(MODEL, good, bad)
        with pytest.raises(UserError, match=wanted + " has no token that pool='prompt' selects$"):
            contrast.contrast(MODEL, good, bad, pool="prompt")
        values[place] = kept
    found = contrast.contrast(MODEL, good + good[:1], bad[:1], pool="prompt", layers=[0])
    assert (found.notes["positive"], found.notes["negative"]) == (3, 1)


@pytest.mark.parametrize(("openings", "messages", "wanted"), [
    ([[]], [["a"], ["b"]], "openings has 1 entries, and messages has 2 lists of 1 messages; give"),
    ([[], []], [["a"], ["b", "c"]], "has 2 entries, and messages has 2 lists of 1, 2 messages; gi"),
    ([[]], [[]], "messages has 1 lists of 0 messages"),
    ([[]], ["ab"], r"messages\[0\] is 'ab'; give one list per conversation"),
    ([[], "x"], [["a"], ["b"]], r"openings\[1\] is 'x'; give one list per conversation")])
def test_conversations_have_one_opening_and_the_same_number_of_messages(openings, messages, wanted):
    """The numbers of the two arguments are in the message."""
    with pytest.raises(UserError, match=wanted):
        talk.grow(MODEL, openings, messages, AXIS)


def test_every_turn_has_its_own_draws_and_is_read_after_its_prompt(monkeypatch):
    """Replies of three tokens, the second without a value; conversations 5 share their draws."""
    calls = []

    def generate(model, prompts, **options):
        calls.append((prompts, options))
        turn = len(calls)
        rows = [one if isinstance(one, Row) else encode(model, one) for one in prompts]
        values = []
        for n, one in enumerate(rows):
            reply = np.array([turn, np.nan, turn + 2.0]) + n
            whole = np.concatenate([np.full(one.tokens.size, 900.0), reply])
            values.append(np.stack([whole, 10 * whole])[..., None])
        ids = MODEL.tokenizer.encode("abc", add_special_tokens=False)[:3]
        tokens = [np.array((ids * 3)[:3], np.int32)] * len(rows)
        return SimpleNamespace(text=[f"{turn}{n}" for n in range(len(rows))], rows=rows,
                               tokens=tokens, stopped=[False] * len(rows),
                               captured={"projections": values})

    monkeypatch.setattr(talk, "generate", generate)
    part, told = np.zeros((8, 128)), []
    part[[2, 5]] = 1
    edits = jp.steer(AXIS, layers=[1])
    found = talk.grow(MODEL, [[], [{"role": "system", "content": "Be."}]],
                      [["a", "b", "c"], ["d", "e", "f"]], Vector(part), ids=[5, 5], seed=3,
                      interventions=edits, report=lambda *step: told.append(step), batch_size=4)
    assert found.replies == [["10", "11"], ["20", "21"], ["30", "31"]] and found.readout is None
    wanted = np.full((3, 2, 8), np.nan)
    wanted[..., 2] = [[2, 3], [3, 4], [4, 5]]
    wanted[..., 5] = 10 * wanted[..., 2]
    np.testing.assert_array_equal(found.projections, wanted)
    ids = [options["ids"] for _, options in calls]
    assert all(one[0] == one[1] for one in ids) and len({one[0] for one in ids}) == 3
    assert all((options["seed"], options["batch_size"], options["interventions"],
                options["on_nonfinite"]) == (3, 4, edits, "raise") for _, options in calls)
    assert calls[0][0][1] == [{"role": "system", "content": "Be."},
                              {"role": "user", "content": "d"}]
    for turn, (_, options) in enumerate(calls):
        options["progress"](1, 2, 9)
        assert told.pop() == (turn, 1, 9)
    sizes = [[row.tokens.size for row in prompts] for prompts, _ in calls[1:]]
    assert sizes[1][0] > sizes[0][0] + 3 and all(isinstance(x, Row) for x in calls[1][0])


def test_a_direction_of_zeros_grows_no_conversation():
    """The report of a turn has its index, the finished replies and the tokens."""
    with pytest.raises(UserError, match="'none' is zero at every layer; choose another direction"):
        talk.grow(MODEL, [[]], [["Hi."]], Vector(np.zeros((8, 128)), "none"))
    told = []
    assert talk._at_turn(False, 1) is None and talk._at_turn(None, 1) is None
    talk._at_turn(lambda *step: told.append(step), 3)(4, 9, 70)
    assert told == [(3, 4, 70)]


def test_a_monitor_says_what_it_reads():
    """Two layers, and quartiles that are known only together."""
    monitor = Monitor(MODEL, AXIS, [2, 5])
    assert monitor.sentence == ("mean projection of the reply's tokens on 'assistant' at layers 2, "
                                "5, read before the interventions at that layer")
    assert monitor.words({}) == "no projection: the reply has no token to project"
    assert list(monitor.usual) == [2, 5]
    for missing in ("p25", "p75"):
        table = {name: np.zeros(8) for name in ("p25", "p50", "p75") if name != missing}
        axis = Axis(AXIS.values, "a", percentiles={"default": table})
        assert Monitor(MODEL, axis).usual == {}
    part = np.zeros_like(AXIS.values)
    part[[2, 5]] = AXIS.values[[2, 5]]
    assert Monitor(MODEL, Vector(part)).layers == (5,)
