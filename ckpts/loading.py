"""From a name to a model: a folder, the embedded model, random weights or a repository of the hub.

Libraries are imported when a source needs them, so that random weights need neither transformers
nor a network.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import pathlib
import reprlib
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxpersona.ckpts import hf, orbax

from jaxpersona.distributed import sharding
from jaxpersona.engine.compile_cache import use_compile_cache
from jaxpersona.inputs import read_json, require_files
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.families import FAMILIES
from jaxpersona.models.model import Model
from jaxpersona.models.params import (
    Params,
    begin_fingerprint,
    fingerprint,
    init_params,
    layout,
)
from jaxpersona.models.presets import preset
from jaxpersona.runtime import own_rules

DTYPES = ("float32", "bfloat16", "float16")
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
# second copies of the weights in another layout, adapters, and folders of other programs
_NOT_FETCHED = ("consolidated*.safetensors", "adapter_model*.safetensors", "*/*.safetensors",
                "original/*", "onnx/*")
_TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt")  # what transformers may read in a folder
# Settings of generation_config.json that transformers' generate follows and ours does not, with
# the value at which each does nothing (null does nothing in any).
_UNFOLLOWED = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "min_length": 0, "min_new_tokens": 0, "num_beams": 1, "num_beam_groups": 1,
    "diversity_penalty": 0.0, "length_penalty": 1.0, "guidance_scale": 1.0, "penalty_alpha": 0.0,
    "suppress_tokens": [], "begin_suppress_tokens": [], "bad_words_ids": [],
    "force_words_ids": [], "constraints": [], "sequence_bias": {}, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "forced_decoder_ids": [], "stop_strings": [],
    "exponential_decay_length_penalty": None, "watermarking_config": None, "dola_layers": None,
    "remove_invalid_values": False, "renormalize_logits": False, "token_healing": False,
}
_SAMPLED = {"top_k": (0, 50), "min_p": (0, 0.0), "top_h": ()}  # those that act on sampling alone
_MINI_VOCABULARY = 1024
_STDERR = threading.Lock()  # guards file descriptor 2


@sharding.on_own_mesh
@own_rules()
def load(source: str | os.PathLike[str], *, mesh: Mesh | None = None, dtype: Any = None,
         progress: hf.Progress | None = None, revision: str | None = None) -> Model:
    """Load a model; programs compiled from now on are kept on disk (`compile_cache`).

    Args:
      source: a folder in the Hugging Face layout or that `ckpts.orbax.save` wrote; "mini", the
        embedded model; "random:<preset>", random weights of a real shape; or a repository of the
        hub, "owner/name" or "owner/name@revision".
      mesh: spreads the parameters over devices; `Model.mesh` is this one fitted to the model
        (`sharding.fit`), which may have another axis: in `jax.set_mesh` either will do for the
        functions that take a model, but only `Model.mesh` for those that take parameters.
      dtype: "float32", "bfloat16" or "float16"; by default float32 where the parameters lie on a
        CPU (the mesh's, or `jax.default_device`), else bfloat16. Gemma 2 and 3 exceed float16,
        which is refused for them.
      progress: called with the bytes read so far and in all.
      revision: a branch, tag or commit of the hub's repository; a commit alone never changes.

    Raises:
      ValueError: no such model, or one that is faulty or not implemented; it says which and why.
    """
    use_compile_cache()
    name, kind = os.fspath(source), _dtype(dtype, mesh)
    path = pathlib.Path(os.path.expanduser(name))
    local = name == "mini" or name.startswith(("random:", ".", "/", "~")) or _there(path)
    if local or isinstance(source, pathlib.PurePath):
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but {name} is no repository of the hub; "
                             "leave it out")
        if name.startswith("random:"):
            return _random(name, kind, mesh)
        if name == "mini":
            with importlib.resources.as_file(_mini()) as folder:
                return _folder(folder, name, kind, mesh, progress)
        return _folder(path, name, kind, mesh, progress)
    repository, _, pinned = name.partition("@")
    if not _is_repository(repository) or name.endswith("@"):
        raise ValueError(f"{name}: no such folder; a model is a folder, owner/name of the hub, "
                         "mini or random:<preset>")
    if pinned and revision not in (None, pinned):
        raise ValueError(f"{name} and revision {revision!r} name two revisions; give one")
    return _folder(_download(repository, pinned or revision), name, kind, mesh, progress)


def _there(path: pathlib.Path) -> bool:
    try:
        return path.exists()
    except OSError:  # reading it says why
        return True


def _mini() -> Any:
    return importlib.resources.files("jaxpersona.ckpts") / "mini"


def _is_repository(name: str) -> bool:
    """Whether a name has the form of a repository of the hub: owner/name."""
    parts = name.split("/")
    plain = all(part and part.strip(".-_") and " " not in part for part in parts)
    return len(parts) == 2 and plain


def _dtype(dtype: Any, mesh: Mesh | None) -> np.dtype:
    if dtype is None:
        where = (sharding.default_platform() if mesh is None else
                 mesh.devices.flat[0].platform)
        return np.dtype(np.float32 if where == "cpu" else jnp.bfloat16)
    try:
        found = np.dtype(getattr(jnp, dtype) if isinstance(dtype, str) else dtype)
    except (TypeError, AttributeError):
        found = None
    if found is None or found.name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    return found


def _check_range(config: ModelConfig, dtype: np.dtype, name: str) -> None:
    """Refuse float16 for families whose activations exceed it, before weights are read."""
    if dtype == np.float16 and not FAMILIES[config.family].float16:
        raise ValueError(f"dtype is 'float16'; activations of {config.family} models such as "
                         f"{name} exceed its 65504: use 'bfloat16' or 'float32'")


def _random(name: str, dtype: np.dtype, mesh: Mesh | None) -> Model:
    config = preset(name.removeprefix("random:"))
    _check_range(config, dtype, name)

    def draw() -> Params:
        return init_params(config, jax.random.key(0), dtype)

    if mesh is None:
        params = draw()
    else:  # made where they belong: no device ever holds them all
        mesh = sharding.fit(mesh, config)
        places = jax.tree.map(lambda s: sharding.weight_sharding(s.axes, s.shape, mesh),
                              layout(config))
        params = jax.jit(draw, out_shardings=places)()
    tokenizer, stop_ids = None, ()
    if config.vocab_size >= _MINI_VOCABULARY and (_mini() / "tokenizer.json").is_file():
        with importlib.resources.as_file(_mini()) as folder:
            tokenizer = read_tokenizer(folder)
            stop_ids = _stop_ids(folder, {}, tokenizer)
    return _model(config, params, tokenizer, mesh, name, stop_ids, fingerprint(config, params))


def _folder(folder: pathlib.Path, name: str, dtype: np.dtype, mesh: Mesh | None,
            progress: hf.Progress | None) -> Model:
    config, raw = hf.read_config(folder)
    _check_range(config, dtype, name)
    mesh = None if mesh is None else sharding.fit(mesh, config)
    if orbax.holds_checkpoint(folder):
        if also := [name for name in (hf.SINGLE, hf.INDEX) if (folder / name).exists()]:
            raise ValueError(f"{folder}: holds both an Orbax checkpoint ({orbax.NAME}) and "
                             f"{also[0]}; remove the one that is out of date")
        params, _ = orbax.load(folder, dtype=dtype, mesh=mesh)
    else:
        params = hf.load(folder, config, dtype=dtype, mesh=mesh, progress=progress)
    finish = begin_fingerprint(config, params)  # the device works while the tokenizer is read
    tokenizer = read_tokenizer(folder)
    return _model(config, params, tokenizer, mesh, name, _stop_ids(folder, raw, tokenizer),
                  finish())


def _model(config: ModelConfig, params: Params, tokenizer: Any, mesh: Mesh | None, name: str,
           stop_ids: tuple[int, ...], mark: str) -> Model:
    template = bool(getattr(tokenizer, "chat_template", None))
    return Model(config, params, tokenizer, mesh, name, mark, stop_ids, template)


def read_tokenizer(folder: pathlib.Path) -> Any:
    """Read a folder's tokenizer through transformers, or None where it has none.

    No code of the folder is run, and nothing asks whether to run it.

    Raises:
      ValueError: its files are malformed, or it cannot be read without code of its own.
    """
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model")):
        return None
    for part in (folder, folder / "additional_chat_templates"):
        if part.is_dir():
            require_files(part, _TOKENIZER_FILES)
    from transformers import AutoTokenizer

    try:
        # False, not None: with None transformers asks at the terminal whether to run the code
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True,
                                                  trust_remote_code=False)
        # a regular expression that the library cannot run ends its first use in a panic
        with _without_stderr():
            tokenizer("Hello, world! 1 + 1", add_special_tokens=False)
    except BaseException as error:  # transformers raises many kinds, tokenizers even panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        if "trust_remote_code" in str(error):
            raise ValueError(f"{folder}: the tokenizer needs Python code of its own (auto_map in "
                             "tokenizer_config.json), which is not run; save the tokenizer as "
                             "tokenizer.json and remove auto_map") from None
        raise ValueError(f"{folder}: the tokenizer cannot be read ({reason})") from None
    template = getattr(tokenizer, "chat_template", None)
    texts = template.values() if isinstance(template, dict) else (template or "",)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{folder}: chat_template in tokenizer_config.json is {template!r:.60}; "
                         "it must be text, or a table of texts")
    return tokenizer


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what native code writes to standard error, such as the backtrace of a panic.

    One thread at a time: a second one would take the first one's sink for the process's own.
    """
    with _STDERR:
        try:
            kept = os.dup(2)
        except OSError:  # there is none
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _stop_ids(folder: pathlib.Path, raw: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Collect the ids that end a reply, from every place that names one, in that order."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    if not isinstance(generation, dict):
        raise ValueError(f"{path}: holds {type(generation).__name__}, not a table")
    _warn_unfollowed(path, generation)
    found: list[int] = []
    for place, value in (
        (path.name, generation.get("eos_token_id")),
        ("config.json", raw.get("eos_token_id")),
        ("the tokenizer", getattr(tokenizer, "eos_token_id", None)),
    ):
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
            raise ValueError(f"{folder}: eos_token_id of {place} is {reprlib.repr(value)}; it must "
                             "be an integer or a list of them")
        found += ids
    return tuple(dict.fromkeys(found))


def _warn_unfollowed(path: pathlib.Path, generation: Mapping[str, Any]) -> None:
    """Warn of a checkpoint's generation settings that `generate` does not follow."""
    unfollowed = [key for key, nothing in _UNFOLLOWED.items()
                  if generation.get(key) is not None and generation[key] != nothing]
    if generation.get("do_sample") is True:
        unfollowed += [key for key, nothing in _SAMPLED.items()
                       if generation.get(key) is not None and generation[key] not in nothing]
    if unfollowed:
        said = ", ".join(f"{key}={reprlib.repr(generation[key])}" for key in unfollowed)
        warnings.warn(f"{path}: ignored {said}; generate has no such setting, so replies may "
                      "differ from those of transformers", stacklevel=2)


def _download(name: str, revision: str | None) -> pathlib.Path:
    """Fetch a repository's files, or find them in the hub's local cache."""
    from huggingface_hub import constants, errors, snapshot_download

    at = f"{name}@{revision}" if revision else name
    try:
        return pathlib.Path(snapshot_download(name, revision=revision,
                                              allow_patterns=list(_PATTERNS),
                                              ignore_patterns=list(_NOT_FETCHED)))
    except errors.GatedRepoError:
        raise ValueError(f"{at}: the repository is gated; accept its terms on huggingface.co and "
                         "log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{at}: the repository has no such revision; give a branch, a tag or a "
                         "commit of it") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{at}: no such folder, and no such repository on the hub (a private one "
                         "needs `hf auth login`)") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no network"
        raise ValueError(f"{at}: no such folder, not in the hub's local cache, and the hub cannot "
                         f"be reached ({why}); download it first, or go online") from None
    except (errors.HFValidationError, errors.HfHubHTTPError, errors.EntryNotFoundError,
            OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{at}: not a folder, and fetching it failed ({reason})") from None
