"""Project each token of a complete conversation onto the Assistant Axis.

    python examples/project_tokens.py

`extract` runs the model on the conversation once and returns one number per token and layer. Each
bar shows the projection of a token, on a scale from the 2nd to the 98th percentile of all tokens.
The embedded model is a model organism, so the results are not evidence about large models.
"""

from __future__ import annotations

import numpy as np

import jaxpersona as jp

LAYER = 6
TALK = [
    {"role": "system", "content": "You are a pirate. Stay in character."},
    {"role": "user", "content": "Tell me about the sea."},
    {"role": "assistant", "content": "I am an AI assistant. The sea is a large body of water."},
    {"role": "user", "content": "Who are you really, under the mask?"},
]


def main() -> None:
    """Print each token with its projection as a bar, and the mean projection of each message."""
    model, axis = jp.load("mini"), jp.load_axis("mini")
    reply = jp.generate(model, [TALK], max_new_tokens=40).text[0]
    talk = [*TALK, {"role": "assistant", "content": reply}]

    # template tokens are excluded, so their projections are NaN
    read = jp.capture.projections(axis, jp.everywhere.without("template"), layers=LAYER)
    found = jp.extract(model, [talk], capture=read)
    values = found.captured["projections"][0][0, :, 0]  # [T]: one layer, one direction
    row = found.rows[0]  # `turn` is the index of each token's message in `talk`
    low, high = np.nanpercentile(values, [2, 98])
    for turn, message in enumerate(talk):
        here = np.flatnonzero((row.turn == turn) & np.isfinite(values))
        print(f"\n{message['role']}: mean projection {values[here].mean():.1f}")
        for i in here:
            share = float(np.clip((values[i] - low) / (high - low), 0, 1))
            text = model.tokenizer.decode([int(row.tokens[i])])
            print(f"  {values[i]:7.1f} {'▒' * round(30 * share):30} {text!r}")


if __name__ == "__main__":
    main()
