"""Clear errors for calls that do not match the function's signature."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import numpy as np

from jaxpersona.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

# wrong argument name → candidates; the first candidate that the function accepts is suggested
_NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("layer", "layer_idx", "layer_ids", "layers_ids", "at"), ("layers",)),
    **dict.fromkeys(("coeff", "coef", "coefficient", "alpha", "strength", "multiplier", "factor",
                     "lam", "weight", "c"), ("scale", "coefficient", "factor")),
    **dict.fromkeys(("max_tokens", "max_length", "max_new", "max_gen_len", "n_tokens", "new_tokens",
                     "length"), ("max_new_tokens",)),
    **dict.fromkeys(("prompt", "prompts", "messages", "inputs", "texts", "text", "conversation",
                     "chats", "input_ids"), ("conversations", "conversation", "tokens")),
    **dict.fromkeys(("threshold", "tau", "min", "minimum", "low", "lower", "cap", "value",
                     "percentile", "pct"),
                    ("floor", "value")),
    **dict.fromkeys(("max", "maximum", "high", "upper"), ("ceiling",)),
    **dict.fromkeys(("position", "positions", "tokens", "token", "mask", "on"), ("where",)),
    **dict.fromkeys(("hooks", "hook", "edits", "edit", "intervention", "steering", "caps"),
                    ("interventions",)),
    **dict.fromkeys(("captures", "cache", "read", "readings", "capturing"), ("capture",)),
    **dict.fromkeys(("batch", "bs", "n_rows", "batch_size"),
                    ("batch_size", "batch_tokens", "rows")),
    **dict.fromkeys(("direction", "directions", "vec", "v", "vectors", "axis"),
                    ("vector", "directions")),
    **dict.fromkeys(("temp", "t"), ("temperature",)),
    **dict.fromkeys(("topp", "p", "nucleus"), ("top_p",)), "topk": ("top_k",),
    **dict.fromkeys(("random_seed", "rng", "key", "generator"), ("seed",)),
    **dict.fromkeys(("torch_dtype", "precision"), ("dtype",)),
    **dict.fromkeys(("path", "name", "model", "checkpoint", "model_name", "repo"),
                    ("source", "path")),
    **dict.fromkeys(("file", "filename", "fname"), ("path", "source")),
    "add_generation_prompt": ("reply",), "vocab_size": ("vocabulary",),
    **dict.fromkeys(("pos", "positives", "good"), ("positive",)),
    **dict.fromkeys(("neg", "negatives", "bad"), ("negative",)),
}
_ADVICE = {
    "do_sample": "temperature=0 decodes greedily; any other temperature samples",
    "device": "use jax.default_device for one device, or mesh= for several",
    "device_map": "use mesh=jp.make_mesh(…)",
    "load_in_8bit": 'use dtype="int8"',
    "load_in_4bit": '4-bit weights are not supported; use dtype="int8"',
    "trust_remote_code": "code from a checkpoint is never run",
    "stop": "use jp.Engine and jp.Request(stop=…)",
    "stream": "use jp.Engine and engine.stream(handle)",
    "return_tensors": "the result contains NumPy arrays, which JAX accepts",
    "num_return_sequences": "repeat the conversation in the list of conversations",
}

# function → how to call it, shown if there are too many or too few arguments
_CALLS = {
    "forward": "call jp.forward(model.params, model.config, batch)",
    "stack_rows": "give one list with an item per row, such as jp.stack_rows([None, cap])",
    "save_vector": "call jp.save_vector(path, vector)",
}


def checked_call(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that a call with wrong arguments raises a `UserError` with a hint.

    Python's TypeError suggests at most an argument with a similar spelling. The hint also covers
    names that other libraries use, such as `torch_dtype` for `dtype`.
    """
    signature = inspect.signature(function)
    of = function.__qualname__.split(".")  # messages name `__init__` by its class
    name = of[-2] if of[-1] == "__init__" else of[-1]

    @functools.wraps(function)
    def call(*args: P.args, **named: P.kwargs) -> R:
        try:
            signature.bind(*args, **named)
        except TypeError:
            raise UserError(_explain(name, signature, args, named)) from None
        return function(*args, **named)

    return call


def checked_class(cls: type[R]) -> type[R]:
    """Decorate a class so that `checked_call` checks the arguments of its constructor."""
    made: Any = cls
    made.__init__ = checked_call(made.__init__)
    return cls


def _explain(name: str, signature: inspect.Signature, args: tuple[Any, ...],
             named: Mapping[str, Any]) -> str:
    """Return a message that explains why a call does not match a signature, with the fix."""
    known = dict(signature.parameters)
    if known.pop("self", None):
        args = args[1:]
    usage = f"; {_CALLS[name]}" if name in _CALLS else ""
    ordered = [p.name for p in known.values() if p.kind in (p.POSITIONAL_ONLY,
                                                           p.POSITIONAL_OR_KEYWORD)]
    for given in named:
        if given not in known:
            return f"{name}() has no argument {given!r}; {_remedy(given, list(known))}"
    if len(args) > len(ordered) and usage:
        return f"{name}() takes {_listed(ordered)} by position, not {len(args)} values{usage}"
    if len(args) > len(ordered):
        others = [key for key in known if key not in ordered and key not in named]
        first = f"{args[len(ordered)]!r:.40}"
        return (f"{name}() takes {_listed(ordered) or 'no arguments'} by position; pass {first} "
                f"by keyword, as one of {_listed(others)}")
    for given in named:
        if given in ordered[: len(args)]:
            return f"{name}() got {given!r} twice, by position and by keyword"
    bound = {*ordered[: len(args)], *named}
    missing = [p.name for p in known.values() if p.default is p.empty and p.name not in bound
               and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return f"{name}() needs {_listed(missing)}{usage}"


def _remedy(given: str, known: list[str]) -> str:
    """Return advice on an unknown argument: a hint, a similar name or the list of arguments."""
    if given in _ADVICE and given not in known:
        return _ADVICE[given]
    for right in _NAMES.get(given.lower(), ()):
        if right in known:
            return f"did you mean {right}?"
    if near := difflib.get_close_matches(given.lower(), known, 1, 0.7):
        return f"did you mean {near[0]}?"
    return f"its arguments are {_listed(known)}"


def _listed(names: list[str]) -> str:
    return ", ".join(names)


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of Python or NumPy, but not a bool.

    Examples:
      >>> import numpy as np
      >>> from jaxpersona.calls import is_integer
      >>> is_integer(np.int32(2)), is_integer(True), is_integer(2.0)
      (True, False, False)
    """
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
