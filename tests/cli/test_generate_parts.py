"""The parts of `generate` and `chat`: batches, streams, records and options, without a model."""

from __future__ import annotations

import contextlib
import json
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.vectors import save_vector

import jaxpersona as jp
from jaxpersona.cli import caps, generate, support
from jaxpersona.cli.edits import Edits
from jaxpersona.errors import UserError
from jaxpersona.persona import check as module
from jaxpersona.persona.monitor import NAME
from jaxpersona.vectors.caps import Caps
from jaxpersona.vectors.vector import Axis, Vector

TALK = [{"role": "user", "content": "Hi."}]


def enough(*_, **__):
    raise UserError("enough")


@pytest.fixture
def shown(monkeypatch):
    """The reports of the progress display."""
    seen = []

    @contextlib.contextmanager
    def display(log=False, note=None):
        yield lambda *given: seen.append(given)

    for owner in (support, generate, caps):
        monkeypatch.setattr(owner, "progress", display)
    return seen


@pytest.fixture
def batch(monkeypatch):
    """The arguments of the generation; its result is "made"."""
    seen = []

    def run(model, rows, *, progress, **named):
        progress(3, 5, 77)
        seen.append((model, rows, named))
        return "made"

    monkeypatch.setattr("jaxpersona.engine.generate.generate", run)
    monkeypatch.setattr("jaxpersona.engine.prompts.encode", lambda model, talk: f"row {talk}")
    monkeypatch.setattr("jaxpersona.engine.prompts.row_ids",
                        lambda rows, ids: np.arange(len(rows)) + 10)
    monkeypatch.setattr("jaxpersona.interventions.stack_rows", lambda rows: rows)
    return seen


def test_a_batch_has_at_most_32_rows_and_one_id_per_prompt(batch, shown):
    """Non-finite activations are an error, and the replies are counted in the display."""
    monitor = SimpleNamespace(capture="projections")
    talks = list(range(40))
    assert generate._run("model", talks, "edits", monitor, False, {"seed": 3}) == "made"
    ((model, rows, named),) = batch
    assert model == "model" and rows == [f"row {i}" for i in range(40)]
    assert named == {"interventions": "edits", "ids": list(range(10, 50)), "batch_size": 32,
                     "capture": "projections", "on_nonfinite": "raise", "seed": 3}
    assert shown == [("generate", 3, 5, 77)]


def test_a_comparison_repeats_the_prompts_with_the_same_ids(batch, shown):
    """The first half has the interventions, and the second half has none."""
    generate._run("model", [1, 2], "edits", None, True, {})
    ((_, rows, named),) = batch
    assert rows == ["row 1", "row 2"] * 2 and named["ids"] == [10, 11, 10, 11]
    assert named["interventions"] == ["edits", "edits", None, None]
    assert named["batch_size"] == 4 and named["capture"] is None


def test_a_record_has_the_projections_of_its_own_reply():
    """The prompt of the reply without interventions may have another number of tokens."""
    made = SimpleNamespace(
        text=["a", "b"], stopped=np.array([True, False]), tokens=[np.zeros(2), np.zeros(7)],
        captured={NAME: ["first", "second"]},
        rows=[SimpleNamespace(tokens=np.zeros(n)) for n in (3, 4)])
    monitor = SimpleNamespace(of_reply=lambda captured, start: {captured: start})
    found = generate._record(TALK, made, monitor, 0, [], 1)
    assert found == {
        "prompt": TALK, "reply": "a", "stopped": True, "tokens": 2, "projections": {"first": 3},
        "edits": [], "without": {"reply": "b", "stopped": False, "tokens": 7,
                                 "projections": {"second": 4}}}
    assert generate._record(TALK, made, None, 1, [], None) == {
        "prompt": TALK, "reply": "b", "stopped": False, "tokens": 7, "edits": []}
    assert type(found["stopped"]) is bool and type(found["tokens"]) is int


MONITOR = SimpleNamespace(sentence="onto 'v'", capture="projections",
                          words=lambda means: f"words {means}",
                          of_reply=lambda captured, start: f"{captured} from {start}")


def test_replies_are_printed_with_their_projections_on_standard_error(capsys):
    """The direction is named once; without a monitor, only the replies are printed."""
    records = [{"reply": "a", "projections": 1}, {"reply": "b", "projections": 2}]
    generate._print(records, MONITOR, False)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a\nb\n", "projection: onto 'v'\nwords 1\nwords 2\n")
    generate._print(records, None, False)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a\nb\n", "")


def test_a_comparison_is_a_table_of_the_last_message_and_both_replies(capsys):
    """The reply without interventions is in the second column."""
    talk = [{"role": "system", "content": "Be."}, *TALK]
    records = [{"prompt": talk, "reply": "held", "projections": 1,
                "without": {"reply": "plain", "projections": 2}}]
    for monitor, wanted in ((None, [["Hi.", "plain", "held"]]),
                            (MONITOR, [["Hi.", "plain", "held"], ["", "", ""],
                                       ["", "words 2", "words 1"]])):
        generate._print(records, monitor, True)
        lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
        assert [[cell.strip() for cell in line.strip("│").split("│")]
                for line in lines] == wanted


def test_a_streamed_reply_is_followed_by_its_projections_and_counts(monkeypatch, capsys):
    """One row and one lane are enough for one reply."""
    seen, edits = [], SimpleNamespace(edits=[])
    reply = SimpleNamespace(captured={NAME: "captured"}, applied=[],
                            row=SimpleNamespace(tokens=np.zeros(6)))

    class Engine:
        def __init__(self, model, **options):
            seen.append((model, options))

        def submit(self, request):
            seen.append(request)
            return "handle"

        def stream(self, handle):
            return [SimpleNamespace(text=text) for text in ("So", ".", "")]

        def result(self, handle):
            return reply

    monkeypatch.setattr("jaxpersona.engine.engine.Engine", Engine)
    monkeypatch.setattr("jaxpersona.engine.request.Request",
                        lambda talk, **named: (talk, named))
    monkeypatch.setattr("jaxpersona.persona.session.check_finite",
                        lambda *given: seen.append(given))
    monkeypatch.setattr("jaxpersona.persona.monitor.edit_counts", lambda *given: [
        SimpleNamespace(seen=5, changed=[1, 2], layers=[3, 4])])
    generate._stream("model", TALK, edits, MONITOR, {"seed": 3})
    assert seen == [("model", {"rows": 1, "lanes": 1, "chunk": 4}),
                    (TALK, {"interventions": edits, "seed": 3, "capture": "projections"}),
                    ("model", reply, edits)]
    said = capsys.readouterr()
    assert said.out == "So.\n" and said.err.splitlines() == [
        "projection: onto 'v'", "words captured from 6",
        "intervention 0: tokens selected: 5, activations changed: 3, layers: 2"]
    generate._stream("model", TALK, edits, None, {})
    assert seen[4] == (TALK, {"interventions": edits, "capture": None})
    assert "projection" not in capsys.readouterr().err


def test_the_counts_of_each_intervention_are_summed_over_the_replies(capsys):
    """Two replies with two interventions, the first of which has two layers."""
    def one(seen, *changed):
        return SimpleNamespace(seen=seen, changed=list(changed), layers=[3] * len(changed))

    generate._say_counts([[one(5, 1, 2), one(1, 7)], [one(2, 0, 1), one(3, 1)]])
    assert capsys.readouterr().err.splitlines() == [
        "intervention 0: tokens selected: 7, activations changed: 4, layers: 2",
        "intervention 1: tokens selected: 4, activations changed: 8, layers: 1"]


@pytest.mark.parametrize(("more", "terminal", "streamed"), [
    (["Hi"], True, True), (["Hi"], False, False), (["Hi", "Ho"], True, False),
    (["Hi", "--json"], True, False), (["Hi", "--out", "r.jsonl"], True, False),
    (["Hi", "--cap", "mini", "--no-check", "--compare"], True, False)])
def test_only_one_reply_at_a_terminal_is_streamed(monkeypatch, tmp_path, more, terminal, streamed):
    """JSON, files and comparisons need whole replies."""
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Edits, "build", lambda *_: "edits")
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *_: "model")
    monkeypatch.setattr(generate, "console", lambda: SimpleNamespace(is_terminal=terminal))
    monkeypatch.setattr(generate, "_stream", lambda *given: seen.append(given) or enough())
    monkeypatch.setattr(generate, "_run", enough)
    assert s.run_command(["generate", *more]) == 2
    settings = {"max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    talk = [{"role": "user", "content": "Hi"}]
    assert seen == ([("model", talk, "edits", None, settings)] if streamed else [])


def test_json_and_a_file_may_be_wanted_at_once(monkeypatch, tmp_path, capsys):
    """With --out alone, the replies are not printed."""
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *_: None)
    monkeypatch.setattr(generate, "_run", lambda *_: SimpleNamespace(
        text=["a"], stopped=[True], tokens=[np.zeros(1)], applied=[]))
    monkeypatch.setattr(Edits, "build", lambda *_: SimpleNamespace(edits=[]))
    file = tmp_path / "r.jsonl"
    for more, printed in ((["--json"], 1), ([], 0)):
        assert s.run_command(["generate", "Hi", "--out", str(file), *more]) == 0
        said = capsys.readouterr()
        assert said.out.count("\n") == printed and said.err == f"wrote {file}: 1 reply\n"
        assert json.loads(file.read_text())["reply"] == "a"


@pytest.mark.parametrize("more", [["--temperature", "-1"], ["--top-p", "1.5"], ["--seed", "-1"],
                                  ["--max-new-tokens", "0"]])
@pytest.mark.parametrize("command", [["chat"], ["generate", "Hi"]])
def test_settings_are_checked_before_a_model_is_loaded(monkeypatch, capsys, command, more):
    """Each error names its setting."""
    monkeypatch.setattr("jaxpersona.cli.support.open_model",
                        lambda *_: pytest.fail("a model was loaded"))
    assert s.run_command([*command, *more]) == 2
    name = more[0].removeprefix("--").replace("-", "_")
    assert capsys.readouterr().err.startswith(f"error: {name} is ")


def test_the_options_of_a_chat_reach_its_session(monkeypatch):
    """With their defaults, replies are greedy and have up to 256 tokens."""
    opened, seen = [], []
    monkeypatch.setattr("jaxpersona.cli.support.open_model",
                        lambda *a: opened.append(a) or "model")
    monkeypatch.setattr(Edits, "build", lambda self, model: f"edits of {model}")
    monkeypatch.setattr(Edits, "monitor", lambda self, model, default=False: (model, default))
    monkeypatch.setattr("jaxpersona.persona.session.Session",
                        lambda *given, **named: seen.append((given, named)) or enough())
    assert s.run_command(["chat"]) == 2
    assert s.run_command(["chat", "--model", "m", "--system", "Be.", "--max-new-tokens", "9",
                          "--temperature", "0.5", "--top-p", "0.6", "--seed", "7", "--dtype",
                          "int8", "--adapter", "lora"]) == 2
    assert opened == [("mini", None, None, None), ("m", "int8", None, pathlib.Path("lora"))]
    common = {"interventions": "edits of model", "monitor": ("model", True)}
    assert seen == [
        (("model",), common | {"system": None, "max_new_tokens": 256, "temperature": 0.0,
                               "top_p": 1.0, "seed": 0}),
        (("model",), common | {"system": "Be.", "max_new_tokens": 9, "temperature": 0.5,
                               "top_p": 0.6, "seed": 7})]


@pytest.mark.parametrize(("value", "given", "file", "wanted"), [
    ("f:1:2", {}, "f", ("1:2", None)), ("f:1:2:p2.5", {}, "f", ("1:2", "p2.5")),
    ("a:b:1:2:p50", {}, "a:b", ("1:2", "p50")), ("f:1", {}, "f:1", (None, None)),
    ("f:1:2:x", {}, "f:1:2:x", (None, None)), ("f:1:2", {"percentile": "p9"}, "f", ("1:2", "p9"))])
def test_the_short_form_of_a_cap_is_split_from_the_right(value, given, file, wanted):
    """A value of another form is the name of a file."""
    edits = Edits(cap=value, **given)
    assert edits._cap_file() == (pathlib.Path(file), value.removeprefix(file))
    assert (edits.cap_layers, edits.percentile) == wanted


@pytest.mark.parametrize("given", [
    {"cap": "none.npy", "cap_layers": "x"},
    {"steer": pathlib.Path("none.npy"), "steer_layers": "x"},
    {"axis": pathlib.Path("none.npy"), "axis_layers": "x"}])
def test_layers_are_checked_before_a_file_is_read(given):
    """For each of the three options."""
    with pytest.raises(UserError, match="layers is 'x'; give text such as 46:54"):
        Edits(**given).read()


def test_only_interventions_count_as_edits():
    """A direction to project onto changes nothing."""
    path = pathlib.Path("v.npy")
    assert Edits(cap="a").any and Edits(steer=path).any and Edits(spec=path).any
    assert not Edits(axis=path, axis_layers="1").any


def test_layers_of_projections_need_a_direction(tmp_path):
    """An axis of --cap is one in a chat only; caps are none."""
    caps_file, axis_file = tmp_path / "c.safetensors", tmp_path / "a.safetensors"
    save_vector(caps_file, Caps(np.ones((1, 32)), (1,), np.zeros(1), ("a",)))
    save_vector(axis_file, Axis(np.ones((3, 32))))
    model = s.tiny_model()
    for file, default in ((caps_file, True), (axis_file, False)):
        edits = Edits(cap=str(file), axis_layers="1").read()
        with pytest.raises(UserError, match="--axis-layers needs --axis"):
            edits.monitor(model, default=default)
    assert edits.monitor(model, default=True).layers == (1,)


def test_an_unknown_population_is_found_with_the_file(tmp_path):
    """No model is needed."""
    file = tmp_path / "a.safetensors"
    save_vector(file, Axis(np.ones((3, 4)), percentiles={"default": {"p25": np.zeros(3)}}))
    with pytest.raises(UserError, match="of is 'all'"):
        Edits(cap=str(file), of="all").read()


def test_the_replies_of_a_self_test_are_counted_and_its_result_is_told(monkeypatch, shown, capsys):
    """A failure names the position of the cap and the option that skips the test."""
    def check(model, held, *, progress, **options):
        progress(2, 6, 77)
        return module.Check(ok, ("a", "b"), ("sign: fine", "layers: fine"), (1,),
                            *np.ones((2, 1)), 0, np.ones(1), None)

    monkeypatch.setattr(module, "check", check)
    ok = True
    caps._test("model", "held", "here: ")
    assert shown == [("check", 2, 6, 77)]
    assert capsys.readouterr().err == "check: here: sign: fine; layers: fine\n"
    ok = False
    with pytest.raises(UserError) as caught:
        caps._test("model", "held", "here: ")
    assert str(caught.value) == ("here: the cap fails the self-test: a; b (--no-check skips the "
                                 "self-test)")
    monkeypatch.setattr(module, "check", enough)
    with pytest.raises(UserError) as caught:
        caps._test("model", "held", "here: ")
    assert str(caught.value) == "here: enough (--no-check skips the self-test)"


def test_only_the_caps_of_a_file_of_interventions_are_tested(monkeypatch, tmp_path):
    """A cap on numbers or on a vector without thresholds is not."""
    save_vector(tmp_path / "v.safetensors", Vector(np.ones((3, 32))))
    save_vector(tmp_path / "a.safetensors", Axis(np.ones((3, 32)), percentiles={
        "default": {"p25": np.arange(3.0)}}))
    tested = []
    monkeypatch.setattr(caps, "_test", lambda model, axis, at="", **named: tested.append(
        (at, dict(axis.percentiles), named["layers"], named["floor"])))
    cap = {"operator": "cap", "vector": "a.safetensors", "layers": [1], "floor": 2.0}
    spec = [{"operator": "steer", "vector": "a.safetensors", "layers": [1]},
            {**cap, "vector": "v.safetensors"}, {**cap, "vector": [1.0] * 32}, cap]
    made = caps.spec_edits(s.tiny_model(), spec, tmp_path / "spec.json", True)
    assert len(made.edits) == 4
    ((at, percentiles, layers, floor),) = tested
    assert (at, layers, floor) == ("interventions[3]: ", [1], 2.0) and percentiles
    caps.spec_edits(s.tiny_model(), cap, tmp_path / "spec.json", True)
    assert tested[-1][0] == "" and len(tested) == 2
    caps.spec_edits(s.tiny_model(), spec, tmp_path / "spec.json", False)
    assert len(tested) == 2
    with pytest.raises(UserError, match="spec.json: "):
        caps.spec_edits(s.tiny_model(), {"operator": "none"}, tmp_path / "spec.json", False)


def test_the_layers_of_a_cap_are_the_upper_half_of_any_number(monkeypatch):
    """Of three layers, the last two; the floor is p25 of the default persona."""
    seen = []
    monkeypatch.setattr(caps, "_test", lambda model, held, **named: seen.append(named))
    axis = Axis(np.ones((3, 32)), percentiles={"default": {"p25": np.arange(3.0)}})
    made = caps.cap_edits(s.tiny_model(), axis, None, None, None, True, "user")
    assert list(seen[0]["layers"]) == [1, 2] and seen[0]["floor"].tolist() == [0, 1, 2]
    assert s.same_bits(made, jp.cap(axis, layers=[1, 2], floor=np.arange(3.0), where="user"))
