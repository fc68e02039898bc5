"""Stream two replies from one engine, with the projection of every token as it is generated.

    python examples/stream_projections.py

Both requests have the same conversation, and the second request has a cap. Each event contains the
new text. Because the requests capture projections, an event also contains the projections of the
new tokens. They are computed during generation, without a second forward pass. The embedded model
is a model organism, so the results are not evidence about large models.
"""

from __future__ import annotations

import itertools

import jaxpersona as jp

LAYER = 6
TALK = [{"role": "system", "content": "You are a pirate. Stay in character."},
        {"role": "user", "content": "Who are you really, under the mask?"}]


def main() -> None:
    """Print the events of both streams alternately, with the mean projection of their tokens."""
    model, axis = jp.load("mini"), jp.load_axis("mini")
    cap = jp.cap(axis, layers=slice(4, 8), floor="p25", of="default")
    # the engine compiles its programs once for all interventions within this capacity
    capacity = jp.reserve(4, model.config.d_model, slice(4, 8))
    engine = jp.Engine(model, rows=4, chunk=4, capacity=capacity)
    read = jp.capture.projections(axis, layers=LAYER)
    print(f"p25 of the default persona at layer {LAYER}: {axis.thresholds('p25')[LAYER]:.1f}")
    plain, capped = (
        engine.submit(jp.Request(TALK, interventions=edits, capture=read, max_new_tokens=40))
        for edits in (None, cap))
    for events in itertools.zip_longest(engine.stream(plain), engine.stream(capped)):
        for name, event in zip(("plain", "capped"), events, strict=True):
            if event is not None:
                show(name, event)


def show(name: str, event: jp.Event) -> None:
    """Print one event of a stream."""
    if len(event.tokens):
        places = event.projections["projections"][:, 0, 0]  # [n]: n tokens, one layer, one axis
        print(f"{name:7} {places.mean():6.1f}  {event.text!r}")
    if event.reply is not None:
        changed = sum(int(table.changed.sum()) for table in event.reply.applied)
        print(f"{name:7} ended by {event.reply.finish!r}, activations changed: {changed}")


if __name__ == "__main__":
    main()
