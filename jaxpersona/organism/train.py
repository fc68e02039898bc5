"""Train the embedded model from scratch.

    python -m jaxpersona.organism.train --seed 0 --out FOLDER

The seed determines the training corpus and the initial weights; the tokenizer has a seed of its own
(`tokenizer.CORPUS_SEED`). Training uses `models.forward`, so no other model implementation is
needed to reproduce the shipped model. The learning rate schedule depends on the step, not on
elapsed time, so the speed of the machine does not affect the model.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

from jaxpersona.organism import batches, tokenizer

TOKENS = 3_400_000
BATCH_TOKENS = 2048
LEARNING_RATE = 3e-3
WARMUP = 60
BETAS = (0.9, 0.98)
DECAY = 0.05  # weight decay, on matrices only
CLIP = 1.0


def mini_config():
    """Return the configuration of the embedded model: Qwen 3 architecture, 1.71 M parameters."""
    from jaxpersona.models.config import ModelConfig, Rope

    layers, head = 8, 32
    return ModelConfig(
        family="qwen3",
        vocab_size=tokenizer.VOCAB_SIZE,
        d_model=128,
        n_layers=layers,
        n_heads=4,
        n_kv_heads=2,
        head_dim=head,
        d_ff=384,
        norm_eps=1e-6,
        max_context=tokenizer.CONTEXT,
        rope=Rope(theta=10_000.0),
        attn_scale=head**-0.5,
        tied_embeddings=True,
        windows=(None,) * layers,
        qk_norm=True,
    )


def make_optimizer(steps: int):
    """Return AdamW with gradient clipping and a learning rate schedule over `steps` steps.

    The learning rate increases linearly during a warm-up and then decreases linearly to 0.
    """
    import jax
    import optax

    warmup = min(WARMUP, max(1, steps // 2))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(LEARNING_RATE / warmup, LEARNING_RATE, warmup),
            optax.linear_schedule(LEARNING_RATE, 0.0, max(1, steps - warmup)),
        ],
        [warmup],
    )

    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(schedule, b1=BETAS[0], b2=BETAS[1], weight_decay=DECAY, mask=matrices),
    )


def loss_fn(params, config, batch, weights):
    """Return the weighted mean next-token cross-entropy in nats.

    Args:
      params, config: the parameters and the configuration of the model.
      batch: a `models.batch.Batch` of B conversations, padded to T tokens.
      weights: the loss weight of each token as a prediction target [B, T].
    """
    import jax.numpy as jnp
    import optax

    from jaxpersona.models.forward import forward

    logits = forward(params, config, batch, logits="all").logits
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), batch.tokens[:, 1:]
    )
    return jnp.sum(losses * weights[:, 1:]) / jnp.sum(weights[:, 1:])


def train(
    seed: int,
    folder: str | pathlib.Path,
    tokens: int = TOKENS,
    log=print,
) -> dict[str, float]:
    """Train the model and its tokenizer, and save both in Hugging Face format.

    Args:
      seed: the seed of the corpus and of the initial weights.
      folder: the output folder.
      tokens: the approximate number of training tokens.
      log: a function that is called with a line of text about the progress.

    Returns:
      The training record, a dict: the seed ("seed"), the number of steps ("steps"), the number of
      generated tokens, including incomplete batches, which are dropped ("tokens"), the time of the
      training steps and of saving in seconds ("seconds"), and the mean loss of the last 100 steps
      in nats ("loss").
    """
    import jax
    import numpy as np
    import optax
    from tokenizers import Tokenizer

    from jaxpersona.ckpts import hf
    from jaxpersona.models.batch import batch as as_batch
    from jaxpersona.models.params import init_params

    folder = pathlib.Path(folder)
    tokenizer.train_tokenizer(folder)
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stream, real = batches.make_batches(words, seed, tokens, BATCH_TOKENS)

    config = mini_config()
    params: Any = init_params(config, jax.random.key(seed))  # optax's annotations reject `Params`
    optimizer = make_optimizer(len(stream))
    state = optimizer.init(params)

    @jax.jit
    def gradient(params, batch, weights):
        return jax.value_and_grad(loss_fn)(params, config, batch, weights)

    # The update does not depend on the batch length. As a separate jitted function, it is compiled
    # only once, instead of once per batch length together with the gradient.
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    update = jax.jit(update, donate_argnums=(0, 1))

    started = time.perf_counter()
    losses: list[jax.Array] = []
    for i, piece in enumerate(stream):
        rows = [row[:n] for row, n in zip(piece.tokens, piece.lengths, strict=True)]
        batch = as_batch(rows, width=piece.tokens.shape[1])
        loss, grads = gradient(params, batch, piece.weights)
        params, state = update(params, state, grads)
        losses.append(loss)
        if i % 100 == 0 or i == len(stream) - 1:
            spent = time.perf_counter() - started
            log(f"step {i + 1}/{len(stream)}  loss {float(loss):.4f}  {spent:.0f} s")
    ids = {"eos_token_id": words.token_to_id(tokenizer.STOP)}
    ids["pad_token_id"] = words.token_to_id(tokenizer.END)
    hf.save(folder, params, config, extra_config=ids)
    return {
        "seed": seed,
        "steps": len(stream),
        "tokens": real,
        "seconds": time.perf_counter() - started,
        "loss": float(np.mean(jax.device_get(losses[-100:]))),
    }


def main(argv: list[str] | None = None) -> None:
    """Train from the command line and print the training record as one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="folder to save the model to")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    args = parser.parse_args(argv)
    record = train(args.seed, args.out, args.tokens, log=lambda line: print(line, flush=True))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
