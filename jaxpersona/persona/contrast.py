"""Compute directions from contrasting texts, by the difference of means or by PCA."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from jaxpersona.calls import checked_call
from jaxpersona.captures import capture
from jaxpersona.distributed.context import own_context
from jaxpersona.engine.extract import extract
from jaxpersona.engine.prompts import encode
from jaxpersona.errors import UserError
from jaxpersona.interventions.bank import Layers, resolve_layers
from jaxpersona.interventions.where import Where, last, response
from jaxpersona.models.batch import SYSTEM, TEMPLATE, USER
from jaxpersona.models.int8 import weights_note
from jaxpersona.models.model import check_model
from jaxpersona.text import chat
from jaxpersona.vectors.vector import Vector

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

Method = Literal["mean", "pca"]
Pool = Literal["response", "last", "prompt"]
_PROMPT = Where(any=SYSTEM | USER, none=TEMPLATE)


@checked_call
@own_context()
def contrast(
    model: Model,
    positive: Iterable[Any],
    negative: Iterable[Any],
    *,
    method: Method = "mean",
    pool: Pool | None = None,
    layers: Layers | None = None,
    name: str = "contrast",
) -> Vector:
    """Compute a direction that points from negative to positive texts in activation space.

    Args:
      model: the model, as returned by `load`.
      positive, negative: the texts. Each is a string (one user message), a list of {"role",
        "content"}, a `chat.Row` or token ids.
      method: "mean" computes the difference of the two means (Rimsky et al. 2024). "pca" needs
        pairs of texts and computes ⟨Δ, u⟩·u, where u is the first principal component of the
        uncentered differences within pairs, and Δ is the mean difference (Zou et al. 2023).
      pool: the activation that represents a text. "response" is the mean over the response tokens.
        "last" is the activation at the last token of the prompt, including the generation prompt.
        "prompt" is the mean over the content tokens of system and user messages. Default:
        "response" if all texts end with an assistant message, "last" if none does.
      layers: the layers of the direction; default: all. The direction is zero at other layers.
      name: the name of the direction.

    Returns:
      A `Vector` [L, D] in the residual stream. At each layer, its norm is the distance between the
      two group means along the direction, so `steer(vector, scale=1)` shifts activations by this
      distance.

    Raises:
      UserError: a group is empty; a text has no token that `pool` selects; `pool` is None and only
        some texts end with a reply; the groups differ in size with method="pca"; both groups have
        the same mean activations; activations are not finite; or an argument is invalid.

    Examples:
      >>> import jaxpersona as jp
      >>> model = jp.load("mini")
      >>> vector = jp.contrast(model, ["I love it!", "What joy!"], ["I hate it.", "How sad."])
      >>> edits = jp.steer(vector, layers=4, scale=2.0)
    """
    check_model(model)
    if method not in get_args(Method):
        raise UserError(f"method is {method!r}; it must be one of {', '.join(get_args(Method))}")
    if pool is not None and pool not in get_args(Pool):
        raise UserError(f"pool is {pool!r}; it must be one of {', '.join(get_args(Pool))}")
    groups = {"positive": chat.listed(positive, "positive"),
              "negative": chat.listed(negative, "negative")}
    count = len(groups["positive"])
    if method == "pca" and len(groups["negative"]) != count:
        raise UserError(f"positive and negative have different numbers of texts ({count} and "
                        f"{len(groups['negative'])}); method='pca' needs pairs: give one negative "
                        "text per positive text")
    texts = [text for group in groups.values() for text in group]
    replied = [_replied(text) for text in texts]
    if pool is None and any(replied) and not all(replied):
        raise UserError("some texts end with an assistant message and others do not; give only "
                        "texts of one kind, or use pool='prompt'")
    chosen = pool or ("response" if all(replied) else "last")
    total = model.config.n_layers
    at = resolve_layers(slice(None) if layers is None else layers, total)
    reading = {"response": lambda: capture.mean(response, layers=at),
               "prompt": lambda: capture.mean(_PROMPT, layers=at),
               "last": lambda: capture.last(last, layers=at)}[chosen]()
    rows = [encode(model, text, reply=chosen == "last") for text in texts]
    (values,) = extract(model, rows, capture=reading, on_nonfinite="raise").captured.values()
    if (bad := np.flatnonzero(~np.isfinite(values).all((1, 2)))).size:
        i = int(bad[0])
        argument, index = ("positive", i) if i < count else ("negative", i - count)
        raise UserError(f"{argument}[{index}] has no token that pool={chosen!r} selects"
                        + ("; give an assistant message with content, or use pool='last'"
                           if chosen == "response" else ""))
    wide = values.astype(np.float64)
    delta = wide[:count].mean(0) - wide[count:].mean(0)  # [l, D]
    if method == "pca":
        pairs = np.moveaxis(wide[:count] - wide[count:], 1, 0)  # [l, n, D]
        first = np.linalg.svd(pairs, full_matrices=False)[2][:, 0]
        delta = np.einsum("ld,ld->l", delta, first)[:, None] * first
    if not delta.any():
        raise UserError("positive and negative have the same mean activations; give different "
                        "texts")
    full = np.zeros((total, model.config.d_model), np.float32)
    full[list(at)] = delta
    return Vector(full, name, model.name, model.fingerprint,
                  notes={"method": method, "pool": chosen, "positive": count,
                         "negative": len(texts) - count, **weights_note(model.params)})


def _replied(text: Any) -> bool:
    """Return whether `text` is a conversation that ends with an assistant message."""
    if isinstance(text, chat.Row):
        text = text.messages
    message = text[-1] if isinstance(text, (list, tuple)) and text else None
    return isinstance(message, dict) and message.get("role") == "assistant"
