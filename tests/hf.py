"""The reference for the tests: small random transformers models and their outputs.

The weights are large enough that attention and logits are far from uniform. The weights of all
norms and all biases are random, so that a missing or duplicated term changes the results.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
_NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
          "gemma2": "Gemma2", "gemma3": "Gemma3"}
SIZE = {"vocab_size": 199, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 80,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}


def config(family: str, **fields: Any) -> Any:
    """Create a small transformers configuration; `fields` override `SIZE`."""
    import transformers

    kind = "Gemma3TextConfig" if family == "gemma3" else f"{_NAMES[family]}Config"
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return getattr(transformers, kind)(**{**SIZE, **ends, **fields})


def architecture(family: str) -> Any:
    """Return the transformers class of a family."""
    import transformers

    return getattr(transformers, f"{_NAMES[family]}ForCausalLM")


def model(family: str, seed: int = 0, gain: float = 1.2, **fields: Any) -> Any:
    """Create a random float32 transformers model with eager attention.

    The weights of matrix products have a standard deviation of gain/√inputs.
    """
    import torch

    settings = config(family, **fields)
    settings._attn_implementation = "eager"
    cls = architecture(family)
    torch.set_num_threads(1)  # with such small models, more threads only wait for each other
    torch.manual_seed(seed)
    made = cls(settings).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "norm" in name:
                low, high = (-0.7, 1.0) if family.startswith("gemma") else (0.3, 2.0)
                value.uniform_(low, high, generator=draw)
            elif name.endswith("bias"):
                value.normal_(0, 0.5, generator=draw)
            elif "embed" in name:
                value.normal_(0, 0.5, generator=draw)
            else:
                value.normal_(0, gain * value.shape[1] ** -0.5, generator=draw)
    made.generation_config.pad_token_id = 0
    return made


def residuals(made: Any, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Run right-padded rows through a transformers model.

    Returns:
        The residual stream after every block [L, B, T, D], and the logits [B, T, V]; float32.
    """
    import torch

    width = max(len(row) for row in rows)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    found: list[Any] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in made.model.layers]
    position = torch.arange(width)[None].expand(len(rows), -1)
    with torch.no_grad():
        logits = made(tokens, attention_mask=mask, position_ids=position, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return torch.stack(found).float().numpy(), logits.float().numpy()


def cast(made: Any, dtype: Any) -> Any:
    """Cast only the parameters; `.to(dtype)` would also round the rotary frequencies."""
    for value in made.parameters():
        value.data = value.data.to(dtype)
    return made


def params(made: Any, folder: pathlib.Path, dtype: Any = None) -> tuple[Any, Any]:
    """Convert a transformers model to our parameters and configuration, through a saved folder."""
    from jaxpersona.ckpts import hf

    made.save_pretrained(folder)
    config, _ = hf.read_config(folder)
    return hf.load(folder, config, dtype=dtype), config


def prompts(lengths: list[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Draw random token rows of the given lengths, without ids that end a text."""
    draw = np.random.default_rng(seed)
    return [draw.integers(2, vocabulary, n).tolist() for n in lengths]


def distance(a: Any, b: Any) -> float:
    """Return ‖a − b‖₂ / ‖b‖₂ over all entries."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def steered(v: Any, c: float) -> Any:
    """Return a hook function: h ← h + c·v."""
    return lambda h, torch: h + c * torch.tensor(v, dtype=torch.float32)


def capped(v: Any, floor: float) -> Any:
    """Return a hook function: h ← h − v̂·min(⟨h, v̂⟩ − τ, 0)."""

    def act(h, torch):
        unit = torch.tensor(v / np.linalg.norm(v), dtype=torch.float32)
        return h - unit * torch.clamp((h @ unit)[..., None] - floor, max=0)

    return act


def generate(made: Any, rows: list[list[int]], hooks: Any, new: int, *,
             decode_only: bool = False) -> tuple[np.ndarray, list[np.ndarray]]:
    """Generate `new` tokens greedily with hooks; the rows are left-padded.

    Args:
        hooks: for each layer, the functions that are applied to its residual, in order.
        decode_only: whether hooks apply only to new tokens.

    Returns:
        Tokens [B, new], and for every row its residuals [L, T + new − 1, D].
    """
    import torch

    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    read = [[] for _ in made.model.layers]

    def hook(layer):
        def act(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            if not decode_only or h.shape[1] == 1:
                for edit in hooks.get(layer, ()):
                    h = edit(h, torch)
            read[layer].append(h)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return act

    handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(made.model.layers)]
    try:
        with torch.no_grad():
            out = made.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False,
                                pad_token_id=0)
    finally:
        for handle in handles:
            handle.remove()
    stream = np.stack([torch.cat(x, 1).numpy() for x in read], 1)
    kept = [x[:, width - len(row):] for x, row in zip(stream, rows, strict=True)]
    return out[:, width:].numpy(), kept


def generate_rows(made: Any, rows: list[list[int]], plans: list[Any],
                  new: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Generate greedily like `generate`, with different hooks for every row.

    Args:
        plans: for each row, a list of (layer, fn, prompt, made): fn(h, before, torch) for the row's
        tokens h [T, D], a mask over the prompt's tokens, and whether new tokens are edited.
    """
    import torch

    starts = [max(map(len, rows)) - len(row) for row in rows]

    def edit(layer):
        def act(h, torch=torch):
            out, fresh = h.clone(), h.shape[1] == 1
            for b, plan in enumerate(plans):
                span = slice(None) if fresh else slice(starts[b], None)
                before = h[b, span]
                for at, fn, prompt, made in plan:
                    if at == layer:
                        mask = torch.tensor([made] if fresh else prompt)[:, None]
                        x = out[b, span]
                        out[b, span] = torch.where(mask, fn(x, before, torch), x)
            return out

        return lambda h, torch: act(h)

    layers = {at for plan in plans for at, *_ in plan}
    return generate(made, rows, {layer: [edit(layer)] for layer in layers}, new)


def same_run(ours: Any, rows: list[list[int]], tokens: np.ndarray,
             stream: list[np.ndarray]) -> float:
    """Check that our generation has the tokens and, to 1e-4, the residuals of `generate`.

    Returns:
        The largest relative distance of any row's residual at any layer.
    """
    from support import relative

    worst = 0.0
    for b in range(len(rows)):
        np.testing.assert_array_equal(ours.tokens[b], tokens[b])
        worst = max(worst, relative(ours.captured["full"][b][:, :-1], stream[b]).max())
    assert worst <= 1e-4
    return worst
