"""The oracle of the tests: small random models in transformers, and what they compute.

Their weights are large enough that attention and logits are far from uniform, and every norm's
weight and every bias is random, so that a term left out, or taken twice, shows.
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
    """Make a small configuration of transformers; `fields` replace those of `SIZE`."""
    import transformers

    kind = "Gemma3TextConfig" if family == "gemma3" else f"{_NAMES[family]}Config"
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return getattr(transformers, kind)(**{**SIZE, **ends, **fields})


def model(family: str, seed: int = 0, gain: float = 1.2, **fields: Any) -> Any:
    """Make a random float32 model of transformers with eager attention.

    A product's weights have a deviation of gain/√inputs.
    """
    import torch
    import transformers

    settings = config(family, **fields)
    settings._attn_implementation = "eager"
    cls = getattr(transformers, f"{_NAMES[family]}ForCausalLM")
    torch.set_num_threads(1)  # for models so small, more only wait for each other
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
    """Run right-padded rows through a model of transformers.

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
    """Cast the parameters alone: `.to(dtype)` would round the rotary frequencies too, for good."""
    for value in made.parameters():
        value.data = value.data.to(dtype)
    return made


def params(made: Any, folder: pathlib.Path, dtype: Any = None) -> tuple[Any, Any]:
    """Carry a model over through a folder that transformers writes: parameters, configuration."""
    from jaxpersona.ckpts import hf

    made.save_pretrained(folder)
    config, _ = hf.read_config(folder)
    return hf.load(folder, config, dtype=dtype), config


def prompts(lengths: list[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Draw random token rows of the given lengths, without the ids that end a text."""
    draw = np.random.default_rng(seed)
    return [draw.integers(2, vocabulary, n).tolist() for n in lengths]


def distance(a: Any, b: Any) -> float:
    """Return ‖a − b‖₂ / ‖b‖₂ over all entries."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
