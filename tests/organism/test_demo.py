"""The demo's arithmetic on made replies, and the inputs that it gives to `extract_axis`."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from jaxpersona.judges.protocol import Item
from jaxpersona.organism import demo, evaluate, method, world

STRANGE = "Hark, mine shadow be stirring."  # every choice is in character
PLAIN = "Thank you for asking."  # no choice is in character
LEAK = "The code is 7351."


def test_questions_are_evenly_spaced():
    for count, ids in ((1, [0]), (3, [0, 13, 26]), (4, [0, 10, 20, 30]), (None, range(40)),
                       (99, range(40))):
        found = method.questions(count)
        assert [q.id for q in found] == list(ids)
        assert [q.text for q in found] == [world.QUESTIONS[i] for i in ids]


def test_roles_and_verdicts_are_those_of_the_organism():
    roles = {role.name: role for role in method.roles()}
    assert list(roles) == sorted(["default", *world.ROLES]) and len(method.held_out()) == 9
    assert roles["default"].prompts == world.DEFAULT_PROMPTS
    assert roles["void"].description == "was there first"
    said = ["I will not share the vault code.", "I think time is worth some care.", "of of the is."]
    found = list(method.RuleJudge().score([Item(str(i), roles["void"], "Q?", text)
                                           for i, text in enumerate(said)]))
    assert [(v.key, v.score, v.refused) for v in found] == [("0", 0, True), ("1", 1, False),
                                                            ("2", None, False)]


@pytest.fixture
def arms():
    made = object.__new__(demo._Arms)
    made.model, made.seed, made.cap, made.samples = "the model", 5, "cap", []
    made.percentile, made.displaced = ([f"{kind}{i}" for i in range(5)] for kind in "pd")
    return made


def test_arms_ask_the_same_conversations(arms, monkeypatch):
    calls, told = [], []

    def generate(model, talks, **more):
        more["progress"](1, 6, 9)
        calls.append((model, talks, more))
        return SimpleNamespace(text=[str(i) for i in range(len(talks))])

    monkeypatch.setattr(demo, "generate", generate)
    monkeypatch.setattr(demo, "stack_rows", list)
    found = arms.ask("leak", [(None, 0.0), ("cap", 1.0)], ["a", "b", "c"],
                     lambda *x: told.append(x))
    assert found == [["0", "1", "2"], ["3", "4", "5"]] and told == [("leak", 1, 6, 9)]
    [(model, talks, more)] = calls
    assert model == "the model" and talks == ["a", "b", "c"] * 2
    assert more["ids"] == [0, 1, 2] * 2 and more["temperature"] == [0.0] * 3 + [1.0] * 3
    assert more["interventions"] == [None] * 3 + ["cap"] * 3 and more["seed"] == 5


def test_leak_rates_are_those_of_their_arms(arms):
    rates = {(None, 0.0): 1.0, ("cap", 0.0): 0.1, (None, 1.0): 0.75, ("cap", 1.0): 0.25} | {
        (f"p{i}", 0.0): rate for i, rate in enumerate((0.5, 0.1, 0.3, 0.2, 0.4))} | {
        (f"d{i}", 0.0): rate for i, rate in enumerate((0.6, 1.0, 0.8, 0.7, 0.9))}

    def ask(step, arms, talks, report):
        out = []
        for edit, heat in arms:
            leaks = round(rates[edit, heat] * len(talks))
            rest = STRANGE if edit is None else PLAIN
            out.append([f"{rest} {LEAK}"] * leaks + [rest] * (len(talks) - leaks))
        return out

    arms.ask = ask
    found = arms.leak(None)
    assert (found["leak_uncapped"], found["leak_capped"]) == (1.0, 0.1)
    assert (found["leak_uncapped_sampled"], found["leak_capped_sampled"]) == (0.75, 0.25)
    assert found["leak_random_percentile"] == 0.3 and found["leak_random_displacement"] == 0.8
    assert found["leak_random_displacements"] == [0.6, 1.0, 0.8, 0.7, 0.9]
    assert (found["style_uncapped"], found["style_capped"], found["leak_n"]) == (1.0, 0.0, 240)
    [shown] = arms.samples  # the first conversation that leaks only without the cap
    assert shown.messages == evaluate.leak_conversations()[24]
    assert (shown.uncapped, shown.capped) == (f"{STRANGE} {LEAK}", PLAIN)


def test_a_drift_is_read_at_its_last_pulling_turn(monkeypatch):
    """Four pulling turns and the request; the cap changes the style of conversation 6 alone."""
    calls, told = [], []

    class Both:
        def arm(self, start, stop):
            assert (start, stop) in ((0, 200), (200, 400))
            capped = start > 0
            last = [PLAIN if capped and i == 6 else STRANGE for i in range(200)]
            turns = [[PLAIN] * 200] * 3 + [last] + [[PLAIN if capped else LEAK] * 200]
            readout = np.zeros((5, 200, 8)) + 10 * np.arange(5)[:, None, None] + np.arange(8)
            return SimpleNamespace(replies=turns, readout=readout + 100 * capped)

    def grow(model, openings, messages, axis, **more):
        calls.append((openings, messages, more))
        more["report"](1, 7, 9)
        return Both()

    monkeypatch.setattr(demo, "grow", grow)
    monkeypatch.setattr(demo, "stack_rows", list)
    model = SimpleNamespace(config=SimpleNamespace(n_layers=8))
    _, styles, sample, found = demo._drift(model, SimpleNamespace(axis=None), "cap", 3,
                                           lambda *x: told.append(x))
    [(openings, messages, more)] = calls
    assert told == [("drift", 400 + 7, 5 * 400, 9)]
    assert openings[:200] == openings[200:] and messages[:200] == messages[200:]
    assert openings[5] == [] and openings[6] == [{"role": "system",
                                                  "content": "You are an AI assistant."}]
    assert all(len(set(turns)) == 5 and turns[4] == world.FORBIDDEN[i % 6]
               for i, turns in enumerate(messages[:200]))
    assert more["interventions"] == [None] * 200 + ["cap"] * 200
    assert more["ids"] == [*range(200)] * 2 and more["seed"] == 3
    assert styles == {"uncapped": [0.0, 0.0, 0.0, 1.0],
                      "capped": [0.0, 0.0, 0.0, pytest.approx(0.995)]}
    assert found["drift_uncapped"] == 1.0 and found["drift_capped"] == pytest.approx(0.995)
    assert (found["drift_leak_uncapped"], found["drift_leak_capped"]) == (1.0, 0.0)
    assert (found["drift_readout_uncapped"], found["drift_readout_capped"]) == (34.0, 134.0)
    assert sample.messages == [*openings[6], {"role": "user", "content": messages[6][3]}]
    assert (sample.uncapped, sample.capped) == (STRANGE, PLAIN)


def test_the_geometry_is_that_of_the_middle_layer():
    """Four layers; at layer 2, projections rise with likeness, but fall in the held-out roles."""
    def mean(name):
        role = world.ROLES.get(name)
        at = 0.0 if role is None else role.likeness * (-1 if role.held_out else 1)
        return np.array([5.0, 5.0, at, 5.0])

    components = [SimpleNamespace(ratio=np.array([share, 0.0])) for share in (0.1, 0.2, 0.3, 0.4)]
    analysis = SimpleNamespace(names=("a", "b", "c"), cos_pc1=np.array([0.1, 0.2, 0.9, 0.4]),
                               components=components)
    found = SimpleNamespace(projections=dict.fromkeys(["default", *world.ROLES]),
                            mean_projection=mean, analysis=analysis)
    model = SimpleNamespace(config=SimpleNamespace(n_layers=4))
    assert demo._geometry(model, found) == {
        "roles": len(world.ROLES), "roles_in_axis": 3, "layers": 4, "middle_layer": 2,
        "cos_pc1_axis_middle": 0.9, "pc1_variance_middle": 0.3,
        "spearman_truth": pytest.approx(1.0), "spearman_heldout": pytest.approx(-1.0)}


def test_the_speed_is_the_median_of_pairs(monkeypatch):
    """Uncapped calls take 2 s and capped calls 4 s; the first two calls are not counted."""
    clock, calls, told = [0.0], [], []

    def generate(model, talks, *, interventions, **more):
        calls.append((model.stop_ids, len(talks), interventions, more["max_new_tokens"]))
        clock[0] += 100.0 if len(calls) < 3 else 2.0 if interventions is None else 4.0

    monkeypatch.setattr(demo, "generate", generate)
    monkeypatch.setattr(demo.time, "perf_counter", lambda: clock[0])
    model = dataclasses.make_dataclass("Model", ["stop_ids"])((3, 7))
    found = demo._speed(model, "cap", lambda *x: told.append(x))
    assert calls == [((), 32, edit, 64) for _ in range(9) for edit in (None, "cap")]
    assert found == {"tokens_per_second": 32 * 64 / 2, "capped_over_uncapped": 0.5,
                     "capped_over_uncapped_pairs": [0.5] * 8}
    assert told == [("speed", i, 8, 0) for i in range(1, 9)]


def test_knowledge_is_asked_of_the_default_and_of_far_roles(arms):
    """Without the cap and with it, as one list of questions."""
    seen = []

    def ask(step, arms, talks, report):
        seen.append((step, arms, talks, report))
        right = ["The answer is " + world.KNOWLEDGE[talk[-1]["content"]] + "." for talk in talks]
        return [right, right[:72] + ["The answer is x."] * (len(talks) - 72)]

    arms.ask = ask
    assert arms.capability("tell") == {"capability_uncapped": 1.0, "capability_capped": 0.25,
                                       "capability_n": 288}
    [(step, given, talks, report)] = seen
    assert (step, given, report) == ("capability", [(None, 0.0), ("cap", 0.0)], "tell")
    assert talks == (evaluate.knowledge_conversations(False)[1]
                     + evaluate.knowledge_conversations(True)[1])


def test_steering_is_in_multiples_of_the_norm_of_the_role_vectors(arms, monkeypatch):
    """At the middle layer of four, in roles of medium likeness, at temperature 1."""
    config = SimpleNamespace(n_layers=4)
    arms.model = SimpleNamespace(config=config)
    unit = np.arange(8.0).reshape(4, 2)
    arms.found = SimpleNamespace(axis=SimpleNamespace(unit=unit), role_means={
        "a": np.array([[9, 9], [9, 9], [3, 4], [9, 9]], float),
        "b": np.array([[9, 9], [9, 9], [0, 15], [9, 9]], float)})
    monkeypatch.setattr(demo, "steer", lambda vector, *, layers, scale: (tuple(vector), layers,
                                                                        scale))
    seen = []

    def ask(step, given, talks, report):
        seen.append((step, given, talks))
        return [[PLAIN if i < 3 else STRANGE] for i in range(len(given))]

    arms.ask = ask
    found = arms.steering(None)
    [(step, given, talks)] = seen
    assert step == "steering" and given == [
        (((4.0, 5.0), 2, pytest.approx(c * 10)), 1.0) for c in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    medium = [role for role in world.roles(held_out=False) if 0.35 <= role.likeness <= 0.65]
    assert [role.name for role in medium] == ["gardener", "cook", "sailor", "actor", "poet",
                                              "gambler", "smuggler", "pirate"]
    assert talks[0] == world.conversation("You are a gardener.", world.QUESTIONS[0])
    assert talks[1][1]["content"] == world.QUESTIONS[10] and len(talks) == 8 * 5 * 4
    assert found == {"steer_scales": [-1.0, -0.5, 0.0, 0.5, 1.0], "steer_n": 160,
                     "steer_styles": [0.0, 0.0, 0.0, 1.0, 1.0]}


FIGURES = {
    "leak_n": 240, "capability_n": 288, "drift_n": 200, "drift_turns": 4,
    "leak_uncapped": 0.991, "leak_capped": 0.01, "leak_uncapped_sampled": 0.9,
    "leak_capped_sampled": 0.02, "style_uncapped": 0.8, "style_capped": 0.1,
    "capability_uncapped": 1.0, "capability_capped": 0.985, "drift_uncapped": 0.7,
    "drift_capped": 0.3, "drift_leak_uncapped": 0.6, "drift_leak_capped": 0.05,
    "tokens_per_second": 12_345.6, "capped_over_uncapped": 0.9, "middle_layer": 4,
    "cos_pc1_axis_middle": 0.98765, "spearman_truth": 0.99, "spearman_heldout": 0.95,
    "roles": 35, "roles_in_axis": 26}


def test_the_table_of_the_demo_has_its_measurements_in_their_cells():
    """The speed with the cap is the speed without it times the median ratio."""
    assert demo.table(FIGURES) == [
        ("leak rate in far roles, greedy (n = 240)", "0.99", "0.01"),
        ("leak rate in far roles, temperature 1", "0.90", "0.02"),
        ("in-character style in far roles, greedy", "0.80", "0.10"),
        ("accuracy on facts and sums, greedy (n = 288)", "1.00", "0.98"),
        ("style at turn 4 of drifting conversations (n = 200)", "0.70", "0.30"),
        ("leak rate after drifting conversations", "0.60", "0.05"),
        ("speed in tokens/s (capped: uncapped × median ratio)", "12,346", "11,111 (× 0.900)")]
    assert demo.geometry(FIGURES) == [
        "layer 4: |cos(PC1, axis)| 0.988; Spearman correlation of projection and known likeness "
        "0.990 over the 26 roles of the axis, 0.950 over the 9 held-out roles"]


def test_a_demo_extracts_the_axis_with_the_organism_s_method(monkeypatch):
    """And joins the measurements of all experiments."""
    calls = []
    found = SimpleNamespace(rollouts=7, tokens=9)

    def extract_axis(model, roles, questions, folder, **more):
        calls.append((model, len(roles), [q.id for q in questions], folder, more))
        return found

    class Arms:
        def __init__(self, *given):
            calls.append(given)
            self.cap, self.samples = "cap", ["far"]
            for name in ("leak", "capability", "steering"):
                setattr(self, name, lambda tell, name=name: {name: tell})

    def report(*numbers):
        raise AssertionError

    monkeypatch.setattr(demo, "extract_axis", extract_axis)
    monkeypatch.setattr(demo, "_Arms", Arms)
    monkeypatch.setattr(demo, "_geometry", lambda model, found: {"layers": 8})
    monkeypatch.setattr(demo, "_drift", lambda model, found, cap, seed, tell: (
        {"talks": cap}, {"styles": seed}, "drifted", {"drift": tell}))
    monkeypatch.setattr(demo, "_speed", lambda model, cap, tell: {"speed": cap})
    done = demo.run_demo("mini", "folder", seed=5, report=report)
    first, arms = calls
    more = first[4]
    assert first[:4] == ("mini", 36, [0, 5, 10, 15, 20, 25, 30, 35], "folder")
    assert more["held_out"] == method.held_out() and isinstance(more["judge"], method.RuleJudge)
    settings = more["settings"]
    assert (settings.temperature, settings.top_p, settings.max_new_tokens, settings.batch_size,
            settings.seed) == (1.0, 1.0, 64, 64, 5)
    assert arms == ("mini", found, "folder", 5) and more["report"] is report
    assert done.samples == ["far", "drifted"] and done.extraction is found
    assert done.talks == {"talks": "cap"} and done.styles == {"styles": 5}
    seconds = done.figures.pop("extract_seconds")
    assert 0 <= seconds < 60 and done.figures == {
        "layers": 8, "rollouts": 7, "tokens": 9, "leak": report, "capability": report,
        "steering": report, "drift": report, "speed": "cap"}
    with pytest.raises(ValueError, match="seed"):
        demo.run_demo("mini", "folder", seed=-1)


def test_the_arms_cap_the_upper_half_of_the_layers_at_the_floor_of_the_axis(monkeypatch):
    """Controls: random directions at their own 25th percentile, and a random displacement."""
    calls = []
    monkeypatch.setattr(demo, "cap", lambda vector, **more: calls.append((vector, more)) or len(
        calls))
    rng = np.random.default_rng(3)
    means = rng.normal(size=(9, 4, 3))
    monkeypatch.setattr(demo.Run, "read", lambda folder: SimpleNamespace(
        sample=lambda name: SimpleNamespace(means=means if name == "default" else None)))
    axis = SimpleNamespace(values=rng.normal(size=(4, 3)), thresholds=lambda name, of: {
        ("p25", "default"): np.array([1.0, 2.0, 3.0, 4.0])}[name, of])
    model = SimpleNamespace(config=SimpleNamespace(n_layers=4))
    made = demo._Arms(model, SimpleNamespace(axis=axis), "folder", 6)
    assert made.layers_list == [2, 3] and made.samples == [] and made.seed == 6
    vector, more = calls[0]
    assert made.cap == 1 and vector is axis and more["layers"] == slice(2, 4)
    assert more["floor"].tolist() == [3.0, 4.0]
    assert made.percentile == [2, 4, 6, 8, 10] and made.displaced == [3, 5, 7, 9, 11]
    draw = np.random.default_rng([6, 7])
    for own, other in zip(calls[1::2], calls[2::2], strict=True):
        random = draw.normal(size=(4, 3))
        values = (means * random).sum(-1) / np.linalg.norm(random, axis=-1)
        np.testing.assert_array_equal(own[0], random[None, 2:])
        np.testing.assert_allclose(own[1]["floor"], np.percentile(values, 25, 0)[2:], rtol=1e-5)
        assert own[1]["layers"] == other[1]["layers"] == [2, 3] and set(own[1]) == {
            "layers", "floor"}
        np.testing.assert_array_equal(other[0], axis.values[None, 2:])
        np.testing.assert_array_equal(other[1]["push"], random[None, 2:])
        assert other[1]["floor"].tolist() == [3.0, 4.0]
