"""Typical beginners' mistakes raise a one-line error with the argument, the value or the fix."""

from __future__ import annotations

import inspect
import pickle

import jax
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona import calls
from jaxpersona.calls import checked_call

MODEL = jp.load("mini")
AXIS = jp.load_axis("mini")
V = AXIS.values[4]
CAPS = jp.Caps(AXIS.values[4:5], (4,), np.ones(1), ("a",))
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ASK = [{"role": "user", "content": "hi"}]


def steer(**more):
    return jp.steer(V, **{"layers": 4, "scale": 1.0, **more})


MISTAKES = {
    # argument names of other libraries
    "layer": (lambda: jp.steer(V, layer=4),
              r"steer\(\) has no argument 'layer'; did you mean layers"),
    "coeff": (lambda: jp.steer(V, layers=4, coeff=2.0), "'coeff'; did you mean scale"),
    "alpha": (lambda: jp.steer(V, layers=4, alpha=2.0), "'alpha'; did you mean scale"),
    "coefficient": (lambda: jp.ablate(V, layers=4, coeff=2.0), "did you mean coefficient"),
    "positions": (lambda: steer(positions="all"), "'positions'; did you mean where"),
    "threshold": (lambda: jp.cap(V, layers=4, threshold=1.0), "did you mean floor"),
    "typo": (lambda: jp.cap(V, layers=4, flor=1.0), "did you mean floor"),
    "max_tokens": (lambda: jp.generate(MODEL, ["a"], max_tokens=5), "did you mean max_new_tokens"),
    "max_length": (lambda: jp.generate(MODEL, ["a"], max_length=5), "did you mean max_new_tokens"),
    "do_sample": (lambda: jp.generate(MODEL, ["a"], do_sample=False),
                  "temperature=0 decodes greedily"),
    "hooks": (lambda: jp.generate(MODEL, ["a"], hooks=steer()), "did you mean interventions"),
    "stop": (lambda: jp.generate(MODEL, ["a"], stop=["x"]), r"jp\.Request\(stop="),
    "prompts": (lambda: jp.generate(MODEL, prompts=["a"]), "did you mean conversations"),
    "device": (lambda: jp.load("mini", device="cuda"), "jax.default_device"),
    "torch_dtype": (lambda: jp.load("mini", torch_dtype="float32"), "did you mean dtype"),
    "path": (lambda: jp.load(path="mini"), "did you mean source"),
    "unknown": (lambda: jp.steer(V, layers=4, zebra=1), "its arguments are vector, layers, scale"),
    "batch": (lambda: jp.extract(MODEL, [TALK], batch=8), "did you mean batch_tokens"),
    "positives": (lambda: jp.contrast(MODEL, positives=["a"], negative=["b"]),
                  "did you mean positive"),
    # missing or positional arguments
    "no layers": (lambda: jp.steer(V), r"steer\(\) needs layers"),
    "no bound": (lambda: jp.cap(V, layers=4), "cap needs a bound; give floor, ceiling or both"),
    "no prompts": (lambda: jp.generate(MODEL), r"generate\(\) needs conversations"),
    "strength by position": (lambda: jp.steer(V, 2.0, layers=4),
                             "takes vector by position; pass 2.0 by keyword, as one of scale"),
    "layer by position": (lambda: jp.steer(V, 4), "by keyword, as one of layers, scale"),
    "twice": (lambda: jp.steer(V, vector=V, layers=4), "'vector' twice"),
    # invalid values
    "a name": (lambda: jp.generate("mini", ["a"]), r"model is 'mini'; give the result of jp\.load"),
    "a name in extract": (lambda: jp.extract("mini", [TALK]), r"model is 'mini'"),
    "a name in logprobs": (lambda: jp.logprobs("mini", [TALK]), r"model is 'mini'"),
    "a name in contrast": (lambda: jp.contrast("mini", ["a"], ["b"]), r"model is 'mini'"),
    "a name in an engine": (lambda: jp.Engine("mini"), r"model is 'mini'"),
    "parameters": (lambda: jp.generate(MODEL.params, ["a"]), "model is Params"),
    "a list of edits": (lambda: jp.generate(MODEL, ["a"], interventions=[steer()]),
                        r"interventions is a list; .*jp\.chain"),
    "a vector as an edit": (lambda: jp.generate(MODEL, ["a"], interventions=AXIS),
                            "interventions is an Axis; give the result of jp.steer"),
    "an uncalled capture": (lambda: jp.generate(MODEL, ["a"], capture=jp.capture.last),
                            r"capture is .*last.*; .*\(\)"),
    "captures of one name": (
        lambda: jp.generate(MODEL, ["a"], capture=[jp.capture.last(), jp.capture.last()]),
        r"two captures have names in common: \['last'\]; give one"),
    "an uncalled capture in a list": (
        lambda: jp.generate(MODEL, ["a"], capture=[jp.capture.last]), r"capture is .*last"),
    "a reading by name": (lambda: jp.Request("a", capture="mean"), r"jp\.capture\.mean\(\)"),
    "one conversation": (lambda: jp.generate(MODEL, ASK), "wrap it in a list"),
    "one string": (lambda: jp.generate(MODEL, "hi"), "wrap it in a list"),
    "last layer": (lambda: jp.steer(V, layers=-1), r"layers is -1.*config\.n_layers − 1"),
    "last layer of an axis": (lambda: jp.steer(AXIS, layers=-1), "-1.*the last layer is 7"),
    "last layers of an axis": (lambda: AXIS[[-2, -1]], "the last layer is 7"),
    "layer beyond": (lambda: jp.generate(MODEL, ["a"], interventions=jp.steer(V, layers=8)),
                     "layer 8.*8 layers|8 layers.*layer 8|0…7"),
    "layer of one": (lambda: jp.steer(V, layers=4.0), r"layers is 4\.0; it must be an int"),
    "width": (lambda: jp.generate(MODEL, ["a"], interventions=jp.steer(np.ones(64), layers=4)),
              "64.*128|128.*64"),
    "a percentile of a vector": (lambda: jp.cap(V, layers=4, floor="p25"),
                                 "floor is 'p25', but only an Axis has percentiles"),
    "an unknown percentile": (lambda: jp.cap(AXIS, layers=4, floor="p26"), "p26.*p25"),
    "an unknown population": (lambda: jp.cap(AXIS, layers=4, floor="p25", of="none"),
                              "of is 'none'; this axis has the populations"),
    "where by an unknown name": (lambda: steer(where="reply"), "where is 'reply'"),
    "zero vector": (lambda: jp.steer(np.zeros(128), layers=4), "zero"),
    "NaN": (lambda: jp.steer(np.full(128, np.nan), layers=4), "all values must be finite"),
    "negative length": (lambda: jp.generate(MODEL, ["a"], max_new_tokens=0), "max_new_tokens is 0"),
    "gpt2": (lambda: jp.load("gpt2"), "gpt2: no such folder.*Llama, Qwen.*Mistral"),
    "Mini": (lambda: jp.load("Mini"), "did you mean mini|'mini'"),
    "unknown preset": (lambda: jp.load("random:llama"), "random:llama|llama-3"),
    "ids of one row": (lambda: jp.batch([1, 2, 3]), r"\[\[1, 2, 3\]\]|list of rows|wrap"),
    "ids beyond": (lambda: jp.batch([[1, 5000]], vocabulary=1024), "row 0 .*5000.*0…1023"),
    "ids beyond a model": (lambda: jp.generate(MODEL, [np.array([1, 5000])]), "5000.*0…1023"),
    "ids beyond in extract": (lambda: jp.extract(MODEL, [np.array([5000])]), "5000.*0…1023"),
    "one conversation of logprobs": (lambda: jp.logprobs(MODEL, TALK), "wrap it in a list"),
    "one conversation of encode": (lambda: jp.encode(MODEL, ASK), "wrap it in a list"),
    "an axis file": (lambda: jp.load_axis("none.safetensors"),
                     "none.safetensors: no such file"),
    "steps of text": (lambda: jp.generate(MODEL, ["a"], temperature="hot"),
                      "temperature is 'hot'; it must be at least 0, and finite in float32"),
    "no assistant message": (lambda: jp.extract(MODEL, [ASK], capture=jp.capture.mean(jp.response)),
                             r"selects no token in conversation 0 \(1 of 1\); add .*=jp\.user"),
    "an engine's batch size": (lambda: jp.Engine(MODEL, batch_size=8),
                               r"Engine\(\) has no argument 'batch_size'; did you mean rows"),
    "a request's limit": (lambda: jp.Request("hi", max_tokens=5),
                          r"Request\(\) has no argument 'max_tokens'; did you mean max_new_tokens"),
    "a percentile as an argument": (lambda: jp.cap(AXIS, layers=4, percentile="p25"),
                                    "'percentile'; did you mean floor"),
    "a file": (lambda: jp.load_axis(file="a.safetensors"), "'file'; did you mean path"),
    "a prompt's end": (lambda: jp.encode(MODEL, ["a"], add_generation_prompt=True),
                       "'add_generation_prompt'; did you mean reply"),
    "a vocabulary": (lambda: jp.batch([[1]], vocab_size=9), "'vocab_size'; did you mean vocab"),
    "a model in forward": (lambda: jp.forward(MODEL, jp.batch([[1]])),
                           r"forward\(\) needs batch; call jp\.forward\(model\.params, model"),
    "rows by position": (lambda: jp.stack_rows(None, jp.cap(V, layers=4, floor=1.0)),
                         r"not 2 values; give one list .*jp\.stack_rows\(\[None, cap\]\)"),
    "a gate of a list": (lambda: jp.gate([steer()], V, layer=2, above=1.0), r"is a list; .*chain"),
    "a gate of an axis": (lambda: jp.gate(AXIS, V, layer=2, above=1.0), r"an Axis; give .*steer"),
    "a gate of nothing": (lambda: jp.gate(None, V, layer=2, above=1.0), "give interventions"),
    "a key": (lambda: jp.generate(MODEL, ["a"], seed=jax.random.key(0)),
              r"seed is .*; give a number such as seed=0, not a key"),
    "a request as a handle": (lambda: next(jp.Engine(MODEL).stream(jp.Request("a"))),
                              r"handle is of type Request; give .*engine\.submit\(request\)"),
    "a result of a request": (lambda: jp.Engine(MODEL).result(jp.Request("a")),
                              "handle is of type Request"),
    "arguments in PyTorch's order": (lambda: jp.save_vector(AXIS, "a.safetensors"),
                                     r"path is Axis.*; the path comes first"),
    "an array to save": (lambda: jp.save_vector("a.npy", V), r"ndarray; .*jp\.Vector\(array\)"),
    "a path that is none": (lambda: jp.load_axis(5), "path is 5; give the path of a file"),
    "a vector to load": (lambda: jp.load_vector(AXIS), "path is Axis.*; give the path of a file"),
    "caps as edits": (lambda: jp.generate(MODEL, ["a"], interventions=CAPS),
                      r"a Caps; call its method \.interventions\(\)"),
    "a file of caps as edits": (lambda: jp.generate(MODEL, ["a"], interventions={"a": CAPS}),
                                r"a dict; give \.interventions\(\) of one of its items"),
    "a percentile of a part": (lambda: jp.cap(AXIS[4:8], layers=slice(4, 8), floor="p25"),
                               "give the axis itself with layers="),
    "an array of all layers": (lambda: jp.steer(AXIS.values, layers=4),
                               r"give jp\.Vector\(array\)"),
    "zero at one layer": (lambda: jp.steer(AXIS[5:8], layers=slice(4, 8)),
                          r"zero at a chosen layer \(4\); .* choose other layers"),
    "a sweep of one prompt": (
        lambda: jp.generate(MODEL, ["a"], interventions=jp.sweep(V, [-1, 0, 1], layers=4)),
        r"size 3, but the batch size is 1; give 3 conversations, .*\[prompt\] \* 3"),
    "a released model": (lambda: jp.load("qwen3-8b"), "random weights; .* owner/name on the Hub"),
    "two roles": (lambda: jp.user & jp.system, r"user & system selects no token; .*\|"),
    "no single test": (lambda: jp.user | jp.last.within(2), "chain one intervention per test"),
    "division by zero": (lambda: AXIS / 0, "divided by 0"),
    "a tokenizer's output": (lambda: jp.generate(MODEL, {"input_ids": [1]}), r"\.input_ids"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_the_fix(name):
    call, message = MISTAKES[name]
    with pytest.raises(jp.UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


CALLABLE = {f"{place}{name}": getattr(module, name)
            for place, module in (("", jp), ("capture.", jp.capture), ("plot.", jp.plot))
            for name in module.__all__
            if inspect.isfunction(getattr(module, name)) and name != "chosen_layers"} | {
    name: getattr(jp, name) for name in ("Axis", "Caps", "Engine", "Request", "Vector")}


@pytest.mark.parametrize("name", CALLABLE)
def test_every_public_callable_explains_a_wrong_argument(name):
    with pytest.raises(jp.UserError, match=r"\(\) (has no argument 'zebra'; |needs )") as caught:
        CALLABLE[name](zebra=1)
    assert str(caught.value).startswith(name.split(".")[-1])


def test_the_signature_and_the_document_stay():
    first = {"steer": "vector", "cap": "vector", "generate": "model", "extract": "model",
             "load": "source", "contrast": "model", "logprobs": "model"}
    for name, argument in first.items():
        function = getattr(jp, name)
        assert function.__doc__ and next(iter(inspect.signature(function).parameters)) == argument
        assert function.__name__ == name and pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize(("args", "named", "wanted"), [
    ((), {"BATCH": 3}, "'BATCH'; did you mean batch_tokens?"),
    ((), {"DEVICES": 3}, "'DEVICES'; did you mean device?"),
    ((), {"maximum": 3}, "its arguments are batch_tokens, floor, device, more"),
    ((), {"device_map": 3}, "use mesh=jp.make_mesh(…)"),
    ((), {}, "call() needs batch_tokens, floor"),
    ((), {"floor": 1}, "call() needs batch_tokens"),
    ((1,), {"floor": 2}, "takes no arguments by position; pass 1 by keyword, as one of "
                         "batch_tokens, device, more"),
])
def test_the_fix_fits_the_signature(args, named, wanted):
    def call(*, batch_tokens, floor, device=None, more=1):
        raise AssertionError

    with pytest.raises(jp.UserError) as caught:
        checked_call(call)(*args, **named)
    assert str(caught.value).startswith("call() ") and str(caught.value).endswith(wanted)


def test_a_type_error_inside_a_function_is_not_caught():
    @checked_call
    def broken(value):
        return value + "x"

    with pytest.raises(TypeError, match="unsupported operand"):
        broken(1)


def test_a_list_of_captures_is_joined():
    listed = [jp.capture.mean(jp.everywhere, layers=4), jp.capture.last(layers=4)]
    both = jp.extract(MODEL, [TALK], capture=listed).captured
    one = jp.extract(MODEL, [TALK], capture=listed[0] | listed[1]).captured
    assert set(both) == {"mean", "last"}
    assert all(np.array_equal(both[name], one[name]) for name in both)
    assert list(jp.Request("a", capture=listed).capture.readings) == ["mean", "last"]


@pytest.mark.parametrize("layers", [4, slice(4, 8), [1, 6]], ids=str)
@pytest.mark.parametrize("of", ["default", "all"])
def test_a_percentile_by_name_is_that_of_the_axis(layers, of):
    numbers = AXIS.thresholds("p25", of=of)
    for bound in ("floor", "ceiling"):
        named = jp.cap(AXIS, layers=layers, of=of, **{bound: "p25"})
        given = jp.cap(AXIS, layers=layers, **{bound: numbers})
        assert s.same_bits(named, given)
    assert not s.same_bits(named, jp.cap(AXIS, layers=layers, ceiling=numbers + 1))


def test_a_number_that_is_also_a_percentile_is_warned_about():
    with pytest.warns(UserWarning, match="floor is 25, which is a projection; .* give floor='p25'"):
        jp.cap(AXIS, layers=4, floor=25)


ALIASES = {
    "layers": "layer layer_idx layer_ids layers_ids at",
    "scale": "coeff coef coefficient alpha strength multiplier factor lam weight c",
    "max_new_tokens": "max_tokens max_length max_new max_gen_len n_tokens new_tokens length",
    "conversations": "prompt prompts messages inputs texts text conversation chats input_ids",
    "floor": "threshold tau min minimum low lower cap value percentile pct",
    "ceiling": "max maximum high upper", "where": "position positions tokens token mask on",
    "interventions": "hooks hook edits edit intervention steering caps",
    "capture": "captures cache read readings capturing", "batch_size": "batch bs n_rows",
    "vector": "direction directions vec v vectors axis", "temperature": "temp t",
    "top_p": "topp p nucleus", "top_k": "topk", "seed": "random_seed rng key generator",
    "dtype": "torch_dtype precision", "source": "path name model checkpoint model_name repo",
    "path": "file filename fname", "reply": "add_generation_prompt", "vocabulary": "vocab_size",
    "positive": "pos positives good", "negative": "neg negatives bad",
}


@pytest.mark.parametrize("right", ALIASES)
def test_names_of_other_libraries_are_known(right):
    """Where a function has no argument with a similar name, the table of names is the only hint."""
    for wrong in ALIASES[right].split():
        assert calls._remedy(wrong, ["zz", right]) == f"did you mean {right}?", wrong
        assert calls._remedy(wrong.upper(), [right]) == f"did you mean {right}?", wrong


@pytest.mark.parametrize(("wrong", "known", "right"), [
    ("c", ["factor", "coefficient"], "coefficient"), ("texts", ["tokens"], "tokens"),
    ("texts", ["tokens", "conversation"], "conversation"), ("cap", ["value"], "value"),
    ("bs", ["rows", "batch_tokens"], "batch_tokens"), ("batch_size", ["rows"], "rows"),
    ("vec", ["directions"], "directions"), ("repo", ["path"], "path"),
    ("fname", ["source"], "source")])
def test_the_first_argument_that_fits_is_suggested(wrong, known, right):
    """In the order of the table, not in the order of the arguments."""
    assert calls._remedy(wrong, known) == f"did you mean {right}?"


@pytest.mark.parametrize(("wrong", "words"), [
    ("load_in_8bit", 'use dtype="int8"'), ("load_in_4bit", "4-bit weights are not supported"),
    ("trust_remote_code", "never run"), ("stream", "engine.stream(handle)"),
    ("num_return_sequences", "repeat the conversation"), ("return_tensors", "NumPy arrays")])
def test_options_without_a_counterpart_are_explained(wrong, words):
    """Unless the function has an argument of this name."""
    assert words in calls._remedy(wrong, ["a"])
    assert words not in calls._remedy(wrong, [wrong])


def test_a_class_and_a_method_are_named_in_their_messages():
    """A constructor by its class, without `self` among its arguments."""
    @calls.checked_class
    class Thing:
        def __init__(self, one, *, two):
            self.one = one

    with pytest.raises(jp.UserError) as caught:
        Thing()
    assert str(caught.value) == "Thing() needs one, two"
    with pytest.raises(jp.UserError, match=r"^Thing\(\) takes one by position; pass 'b' by "
                                           "keyword, as one of two$"):
        Thing("a", "b")
    assert Thing("a", two=1).one == "a"
