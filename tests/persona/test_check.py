"""The self-test accepts a correct axis and reports each kind of defect."""

import dataclasses
import json
import re

import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.vectors import load_vector, save_vector

import jaxpersona as jp
from jaxpersona.persona import axis as science
from jaxpersona.vectors.caps import Caps, fitted
from jaxpersona.vectors.vector import Axis, Vector

pytestmark = pytest.mark.usefixtures("compile_fast")

UPPER = (4, 5, 6, 7)
TALK = [{"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "I am a ghost."}]


@pytest.fixture(scope="module")
def mini():
    """The embedded model."""
    return jp.load("mini")


@pytest.fixture(scope="module")
def axis(mini):
    """Return an axis of the embedded model from few prompts that the check does not use."""
    roles = ("You are a leviathan.", "Act as a hermit.", "You are a jester.", "You are a prophet.")
    asked = ("Tell me about winter.", "What do you think of money?", "What does home mean to you?")
    prompts = ("You are Mini.", "Respond as yourself.", *roles)
    talks = [[{"role": "system", "content": p}, {"role": "user", "content": q}]
             for p in prompts for q in asked]
    out = jp.generate(mini, talks, capture=jp.capture.mean(jp.response), max_new_tokens=16,
                      batch_size=18)
    means = out.captured["mean"]
    values = science.assistant_axis(means[:6].mean(0), means[6:])
    table = science.percentiles(science.project(means[:6], values))
    return Axis(values, "assistant", "mini", mini.fingerprint, percentiles={"default": table})


def test_an_axis_of_the_model_passes(mini, axis):
    """Sign, layers and floors pass, with one sentence each."""
    seen = []
    found = jp.check(mini, axis, progress=lambda *done: seen.append(done))
    assert found.ok and not found.faults and found.shift == 0 and found.layers == UPPER
    assert [text.split(":")[0] for text in found.sentences] == ["sign", "layers", "floors"]
    assert (found.default > found.roles + 10).all() and seen[-1][0] == 18
    quartiles = [axis.thresholds(p, of="default")[4:] for p in ("p25", "p75")]
    np.testing.assert_allclose(found.spread, (quartiles[1] - quartiles[0]) / 1.34898, rtol=1e-4)
    np.testing.assert_allclose(found.z_roles, (found.roles - found.default) / found.spread)
    np.testing.assert_allclose(found.floors, quartiles[0])
    told = re.search(r"by ([\d.]+) to ([\d.]+) standard", found.sentences[0]).groups()
    assert [float(x) for x in told] == pytest.approx(
        [-found.z_roles.max(), -found.z_roles.min()], rel=6e-3)  # three digits
    one = jp.check(mini, axis, layers=[5], floor=float(axis.thresholds("p25", of="default")[5]))
    assert one.ok and one.layers == (5,)
    bare = jp.check(mini, Axis(axis.values))
    assert bare.ok and len(bare.sentences) == 2  # no floors test without a floor
    assert bare.z_floors is None and (bare.spread > 0).all()
    assert "Warning" not in found.sentences[2]
    floors = axis.thresholds("p25", of="default")
    caps = jp.check(mini, Caps(axis.values[2:6], (2, 3, 4, 5), floors[2:6], tuple("abcd")))
    assert caps.ok and caps.shift is None and "too few" in caps.sentences[1]
    caps = jp.check(mini, Caps(axis.values[1:], tuple(range(1, 8)), floors[1:], tuple("abcdefg")))
    assert caps.ok and caps.shift == 0


@pytest.mark.parametrize(("shift", "words"), [(1, "fits layer l-1"), (-1, "fits layer l+1")])
def test_an_axis_that_counts_layers_differently_is_named(mini, axis, shift, words):
    """Shift by one layer in each direction, repeating the first or last layer's vector."""
    rows = np.clip(np.arange(8) - shift, 0, 7)
    found = jp.check(mini, Axis(axis.values[rows]))
    assert not found.ok and found.shift == -shift and words in found.faults[0]


def test_a_wrong_sign_and_a_wrong_scale_are_named(mini, axis):
    """A negated axis, floors scaled by ±100, and one negated layer are reported."""
    flipped = jp.check(mini, dataclasses.replace(axis, values=-axis.values))
    assert not flipped.ok and "away from the Assistant" in flipped.faults[0]
    floor = axis.thresholds("p25", of="default")
    for factor, words in ((100, "would change every token"), (-100, "would never bind")):
        found = jp.check(mini, axis, floor=factor * floor)
        assert not found.ok and len(found.faults) == 1 and words in found.faults[0]
    # a model's own percentiles may be above the short replies of the check, others may not
    table = axis.percentiles["default"]
    raised = dataclasses.replace(axis, percentiles={"default": {
        name: value + 1000 for name, value in table.items()}})
    assert jp.check(mini, raised).ok
    unknown = jp.check(mini, dataclasses.replace(raised, fingerprint=""))
    assert not unknown.ok and "would change every token" in unknown.faults[0]
    turned = axis.values.copy()
    turned[5] *= -1
    found = jp.check(mini, Axis(turned))
    assert not found.ok and "some of the tested layers (5)" in found.faults[0]


def test_what_cannot_be_checked_is_refused(mini, axis):
    """Test an axis of a different model, a zero layer, floors of the wrong shape, no tokenizer."""
    gap = axis.values.copy()
    gap[6] = 0
    for given, options, words in (
        (Axis(axis.values[:-1]), {}, "made for another model"),
        (Axis(axis.values[:, :-1]), {}, "made for another model"),
        (dataclasses.replace(axis, fingerprint="0" * 16), {}, r"another model \(mini\)"),
        (dataclasses.replace(axis, fingerprint=mini.config.hash() + "0" * 8), {},
         r"another model \(mini\)"),
        (Axis(gap), {}, "zero at layer 6"), (axis, {"floor": np.zeros(3)}, "floor has shape"),
        (Caps(axis.values[:1], (9,), np.zeros(1), ("a",)), {}, "made for another model"),
        (Caps(axis.values[:1], (0,), np.zeros(1), ("a",)), {"floor": 0}, "already contain"),
        (axis, {"floor": float("nan")}, "floor is nan"), (axis, {"floor": "p25"}, "floor is 'p25'"),
        (axis, {"floor": [1, 2, 3, np.nan]}, "numbers other than NaN"),
        (axis, {"floor": np.full((50, 8), np.nan)}, r"^floor is array\(\[\[nan, nan[^\n]*; give"),
        (Vector(axis.values), {}, r"of type Vector; the check needs an Axis or Caps"),
        (axis.values, {}, r"of type ndarray; the check needs an Axis or Caps"),
    ):
        with pytest.raises(ValueError, match=words):
            jp.check(mini, given, **options)
    for change, words in (({"tokenizer": None}, "no tokenizer"), ({"template": False}, "no chat")):
        with pytest.raises(ValueError, match=words):
            jp.check(dataclasses.replace(mini, **change), axis)


def test_the_command_checks_before_it_caps(mini, axis, tmp_path, capsys):
    """The command accepts valid axes and caps; --no-check accepts an invalid axis."""
    floors = axis.thresholds("p25", of="default")
    caps = Caps(axis.values[4:], UPPER, floors[4:], tuple("abcd"), "e", "mini", mini.fingerprint)
    for name, value in (("good", axis), ("caps", caps),
                        ("bad", dataclasses.replace(axis, values=-axis.values))):
        save_vector(tmp_path / f"{name}.safetensors", value)

    def command(name, *more):
        code = s.run_command(["generate", "Who are you?", "--cap", str(tmp_path / name), *more,
                              "--max-new-tokens", "4"])
        return code, capsys.readouterr()

    for name in ("good.safetensors", "caps.safetensors"):
        code, said = command(name)
        assert code == 0 and " ".join(said.err.split()).count("check: sign: the default") == 1
        assert "tokens selected" in said.err
    code, said = command("bad.safetensors")
    assert code == 2 and "error: the cap fails the self-test" in said.err
    assert "--no-check" in said.err and "Traceback" not in said.err
    for name, fingerprint in (("other", "0" * 16), ("weights", mini.config.hash() + "0" * 8)):
        save_vector(tmp_path / f"{name}.safetensors",
                    dataclasses.replace(axis, fingerprint=fingerprint))
        for more in ((), ("--no-check",)):
            code, said = command(f"{name}.safetensors", *more)
            assert code == 2 and "axis 'assistant', made for another model" in said.err
    foreign = str(tmp_path / "weights.safetensors")  # the same shape with different weights
    (tmp_path / "talk.json").write_text(json.dumps(TALK))
    for arguments in (["project", str(tmp_path / "talk.json"), "--on", foreign],
                      ["vectors", "convert", foreign, str(tmp_path / "o.npy"), "--model", "mini"],
                      ["generate", "hi", "--steer", foreign]):
        assert s.run_command(arguments) == 2
        assert "axis 'assistant', made for another model" in capsys.readouterr().err
    code, said = command("bad.safetensors", "--no-check")
    assert code == 0 and "check" not in said.err and "tokens selected" in said.err
    for name, more, words in (
        ("caps.safetensors", ("--percentile", "p1"), "omit --percentile"),
        ("caps.safetensors:4:8", (), "caps.safetensors: the caps define their layers and floors; "
         "omit :4:8 from the value of --cap"),
        ("caps.safetensors:4:8:p25", ("--of", "all"), "omit :4:8:p25 from the value of --cap"),
        ("caps.safetensors", ("--experiment", "x"), "choose an experiment with --experiment: e"),
        ("good.safetensors", ("--experiment", "x"), "only to files of caps"),
    ):
        code, said = command(name, *more)
        assert code == 2 and words in said.err
    assert s.run_command(["generate", "hi", "--of", "all"]) == 2
    assert "--of needs --cap" in capsys.readouterr().err


def test_layers_are_the_model_s_and_a_vector_of_another_is_refused(mini, axis, tmp_path, capsys):
    """Negative layers count from the model's last layer, and vectors with too few layers raise."""
    floors = {"default": {"p25": np.zeros(6, np.float32)}}
    for name, value in (("fits", Vector(axis.values)), ("short", Vector(axis.values[:6])),
                        ("axis", jp.Axis(axis.values[:6], percentiles=floors))):
        save_vector(tmp_path / f"{name}.safetensors", value)

    def command(option, name, *more):
        code = s.run_command(["generate", "hi", option, str(tmp_path / f"{name}.safetensors"),
                              "--max-new-tokens", "4", *more])
        return code, " ".join(capsys.readouterr().err.split())

    code, said = command("--steer", "fits", "--steer-layers", "-2:")
    assert code == 0 and "layers: 2" in said
    for option, name in (("--steer", "short"), ("--cap", "axis")):
        code, said = command(option, name)
        assert code == 2 and "layers: 6" in said and "made for another model" in said
    code, said = command("--steer", "fits", "--steer-layers", "9")
    assert code == 2 and "layers is '9', which is out of range; layers must be in 0…7" in said
    spec = tmp_path / "spec.json"
    spec.write_text('{"operator": "steer", "vector": "short.safetensors", "layers": "0:2"}')
    for more in (("--cap", str(tmp_path / "axis.safetensors"), "--cap-layers", "2:4", "--no-check"),
                 ("--spec", str(spec))):
        assert s.run_command(["generate", "hi", "--max-new-tokens", "4", *more]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "layers: 6" in said and "made for another model" in said


def test_a_control_vector_that_stops_below_the_top_is_taken(mini, tmp_path, capsys):
    """GGUF control vectors contain only the layers that they steer."""
    pytest.importorskip("gguf")
    s.write_control(tmp_path / "v.gguf", {f"direction.{layer}": np.ones(128, np.float32)
                                          for layer in range(2, 6)})
    found = fitted(load_vector(tmp_path / "v.gguf"), mini.config, "mini")
    np.testing.assert_array_equal(found.values.any(1), [0, 0, 1, 1, 1, 1, 0, 0])
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"operator": "steer", "vector": "v.gguf", "layers": 2}))
    for more in (("--steer", str(tmp_path / "v.gguf"), "--steer-layers", "2"),
                 ("--spec", str(spec))):
        assert s.run_command(["generate", "hi", "--max-new-tokens", "4", *more]) == 0
        assert "layers: 1" in " ".join(capsys.readouterr().err.split())


def test_the_caps_of_a_spec_are_tested_too(mini, axis, tmp_path, capsys):
    """Each cap on an axis is tested with its layers and floor; other operators are not."""
    for name, value in (("good", axis), ("bad", dataclasses.replace(axis, values=-axis.values)),
                        ("plain", Vector(axis.values)),
                        ("inner", dataclasses.replace(axis, site="mlp"))):
        save_vector(tmp_path / f"{name}.safetensors", value)
    cap = {"operator": "cap", "vector": "good.safetensors", "layers": "4:", "floor": "p25",
           "of": "default"}
    unbound = {key: value for key, value in cap.items() if key not in ("floor", "of")}
    flat = {**unbound, "vector": "plain.safetensors", "floor": 1.0}

    def command(spec, *more):
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        code = s.run_command(["generate", "hi", "--spec", str(tmp_path / "spec.json"), *more,
                              "--max-new-tokens", "4"])
        return code, " ".join(capsys.readouterr().err.split())

    code, said = command([{**unbound, "layers": [5, 6], "ceiling": 1e6}, cap])
    assert code == 0 and said.count("check: interventions[") == 2
    free, held = said.split("check: interventions[")[1:]
    assert free.startswith("0]: sign: the default") and "layers: 5…6" in free
    assert "floors: " not in free  # the axis's floors do not apply to a ceiling
    assert held.startswith("1]: sign: the default") and "floors: " in held
    floor = 100 * float(axis.thresholds("p25", of="default")[5])
    for spec, words in (
        ({**cap, "vector": "bad.safetensors"}, "error: the cap fails the self-test: sig"),
        ([flat, {**unbound, "layers": 5, "floor": floor}],
         "error: interventions[1]: the cap fails the self-test: floors"),
    ):
        code, said = command(spec)
        assert code == 2 and words in said and "--no-check" in said
    code, said = command({**cap, "vector": "bad.safetensors"}, "--no-check")
    assert code == 0 and "check" not in said and "tokens selected" in said
    code, said = command([flat])
    assert code == 0 and "check" not in said and "tokens selected" in said
    code, said = command([flat, {**unbound, "vector": "inner.safetensors", "site": "mlp",
                                 "floor": 1.0}])
    assert code == 0 and "check: interventions[1]: not tested" in said
    assert "measured at site mlp" in said


def test_a_capping_file_holds_the_model_as_the_axis_does(mini, axis, tmp_path, capsys):
    """A capping_config.pt with negated vectors and caps gives the same replies as the axis."""
    torch = pytest.importorskip("torch")
    floors = axis.thresholds("p25", of="default")
    vectors = {f"layer_{i}": {"layer": i, "vector": torch.tensor(-axis.values[i])} for i in UPPER}
    listed = [{"vector": name, "cap": -float(floors[v["layer"]])} for name, v in vectors.items()]
    torch.save({"vectors": vectors, "experiments": [
        {"id": "layers_4:8-p0.75", "interventions": listed},
        {"id": "none", "interventions": listed[:1]}]}, tmp_path / "capping_config.pt")
    save_vector(tmp_path / "axis.safetensors", axis)
    said = []
    for more in (["axis.safetensors"], ["capping_config.pt", "--experiment", "layers_4:8-p0.75"]):
        arguments = ["generate", "Tell me about rain.", "--system", "You are a demon.",
                     "--max-new-tokens", "16", "--cap", str(tmp_path / more[0]), *more[1:]]
        assert s.run_command(arguments) == 0
        out = capsys.readouterr()
        said.append((out.out, out.err[out.err.index("intervention 0"):]))
    assert said[0] == said[1] and " 0 changes" not in said[0][1]


def mean_projections(mini, tokens, at, values):
    """Return [L]: the mean of ⟨h, v̂⟩ over the tokens `at`, computed with NumPy."""
    h = s.residuals(mini, jp.batch([tokens]))[0][0, :, at].mean(0)
    return (h * values / np.linalg.norm(values, axis=-1, keepdims=True)).sum(-1)


def test_an_answer_is_projected_as_the_mean_over_its_own_words(mini, axis):
    """The projections of two replies equal a NumPy computation over their tokens."""
    from jaxpersona.persona.talk import project_conversation
    said = ("I am a ghost.", "The sea is calm and wide today.")
    talk = [*TALK, {"role": "user", "content": "And the sea?"},
            {"role": "assistant", "content": said[1]}]
    found = project_conversation(mini, talk, [axis, Vector(axis.values[::-1])])
    assert [one.turn for one in found] == [1, 3]
    tokens = mini.tokenizer.apply_chat_template(talk, return_dict=False)
    words = [mini.tokenizer.encode(text, add_special_tokens=False) for text in said]
    for one, mine in zip(found, words, strict=True):
        start = next(i for i in range(len(tokens)) if tokens[i : i + len(mine)] == mine)
        at = np.arange(start, start + len(mine))
        assert one.tokens == len(mine) and one.values.shape == (8, 2)
        for k, values in enumerate((axis.values, axis.values[::-1])):
            want = mean_projections(mini, tokens, at, values)
            np.testing.assert_allclose(one.values[:, k], want, rtol=1e-4, atol=1e-4)
            last = mean_projections(mini, tokens, at[-1:], values)
            assert np.abs(last - want).max() > 0.1, "a mean must differ from the last token's"


@pytest.mark.slow
def test_a_grown_reply_is_projected_as_the_mean_over_its_own_tokens(mini, axis):
    from jaxpersona.persona.talk import grow
    grown = grow(mini, [[], [{"role": "system", "content": "You are a jester."}]],
                 [["Who are you?", "And the sea?"]] * 2, axis, max_new_tokens=6)
    assert grown.projections.shape == (2, 2, 8) and len(grown.replies) == 2
    for n, opening in enumerate(([], [{"role": "system", "content": "You are a jester."}])):
        asked = [*opening, {"role": "user", "content": "Who are you?"}]
        out = jp.generate(mini, [asked], max_new_tokens=6)
        assert out.text[0] == grown.replies[0][n]
        prompt = mini.tokenizer.apply_chat_template(asked, add_generation_prompt=True,
                                                    return_dict=False)
        tokens = [*prompt, *out.tokens[0].tolist()]
        want = mean_projections(mini, tokens, np.arange(len(prompt), len(tokens)), axis.values)
        np.testing.assert_allclose(grown.projections[0, n], want, rtol=1e-4, atol=1e-4)
    assert np.abs(grown.projections[0, 0] - grown.projections[0, 1]).max() > 0.1


def test_a_conversation_is_projected_where_a_direction_is_known(mini, axis):
    """A layer with a zero direction gives NaN; values at other layers are unchanged."""
    part = axis.values.copy()
    part[7] = 0
    from jaxpersona.persona.talk import project_conversation
    whole = project_conversation(mini, TALK, [axis])[0].values
    means = jp.extract(mini, [TALK]).captured["mean"][0]  # this message is the whole response
    np.testing.assert_allclose(whole[:, 0], np.einsum("ld,ld->l", means, axis.unit), rtol=1e-4)
    found = project_conversation(mini, TALK, [Vector(part)])[0].values
    np.testing.assert_allclose(found[:7], whole[:7], rtol=1e-5)
    assert np.isnan(found[7]).all() and np.isfinite(whole).all()
    with pytest.raises(ValueError, match="no layer at which"):
        project_conversation(mini, TALK, [Vector(0 * part)])


def test_a_control_vector_is_projected_beside_an_axis(mini, axis, tmp_path, capsys):
    """Layers missing from the file give NaN in Python and an error from the command."""
    pytest.importorskip("gguf")
    (tmp_path / "talk.json").write_text(json.dumps(TALK))
    save_vector(tmp_path / "axis.safetensors", axis)
    file = s.write_control(tmp_path / "v.gguf", {f"direction.{layer}": axis.values[layer]
                                                 for layer in range(2, 6)})
    from jaxpersona.persona.talk import grow, project_conversation
    whole = project_conversation(mini, TALK, [axis])[0].values[:, 0]
    for vectors in ([load_vector(file)], [axis, load_vector(file)]):
        values = project_conversation(mini, TALK, vectors)[0].values[:, -1]
        np.testing.assert_array_equal(np.isfinite(values), [0, 0, 1, 1, 1, 1, 0, 0])
        np.testing.assert_allclose(values[2:6], whole[2:6], rtol=1e-5)
    part, full = (grow(mini, [[]], [["Who are you?"]], vector, max_new_tokens=4).projections
                  for vector in (load_vector(file), axis))
    assert part.shape == (1, 1, 8)
    np.testing.assert_allclose(part[0, 0, 2:6], full[0, 0, 2:6], rtol=1e-5)
    grown = grow(mini, [[]], [["Who are you?"]], load_vector(file), max_new_tokens=4)
    reply = jp.generate(mini, ["Who are you?"], capture=jp.capture.mean(jp.response),
                        max_new_tokens=4)
    assert grown.replies == [reply.text]
    expected = np.einsum("ld,ld->l", reply.captured["mean"][0], axis.unit)
    assert grown.projections.shape == (1, 1, 8)
    np.testing.assert_allclose(grown.projections[0, 0, 2:6], expected[2:6], rtol=1e-3)
    assert np.isnan(grown.projections[0, 0, [0, 1, 6, 7]]).all()
    with pytest.raises(ValueError, match="measured at site 'mlp'"):
        grow(mini, [[]], [["Who are you?"]], dataclasses.replace(axis, site="mlp"))
    command = ["project", str(tmp_path / "talk.json"), "--on", str(file), "--on",
               str(tmp_path / "axis.safetensors"), "--json", "--layer"]
    assert s.run_command([*command, "3"]) == 0
    found = json.loads(capsys.readouterr().out)[0]
    assert found["v"] == pytest.approx(found["assistant"], rel=1e-5)
    assert s.run_command([*command, "7"]) == 2
    assert "'v' is zero at layer 7" in capsys.readouterr().err
