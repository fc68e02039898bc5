"""Hugging Face folders: config.json and safetensors, to parameters and back.

A folder is read tensor by tensor, each shard straight to the devices that hold it, without PyTorch
and without a second copy in memory. Whatever is wrong with it is said at once, before anything
is read.
"""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import json
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxpersona.ckpts import tensorfile
from jaxpersona.ckpts.shards import INDEX, SINGLE, read_entries, some
from jaxpersona.ckpts.tensorfile import DTYPES, Entry

from jaxpersona.distributed import sharding
from jaxpersona.inputs import read_json, require_file, require_folder
from jaxpersona.models.config import ModelConfig, replace
from jaxpersona.models.families import from_hf, to_hf
from jaxpersona.models.params import Params, Spec, layout

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADAPTER = "adapter_config.json"
READERS = 3  # tensors read at one time; where memory is slow to be had, one thread waits for it
Progress = Callable[[int, int], None]


def read_config(folder: str | pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a folder's config.json.

    Where it says that the head is the embedding (`tie_word_embeddings`), but the folder's weights
    hold a head with other values, the configuration is that of an untied model, as in transformers,
    and a warning says so.

    Returns:
      The configuration, and the file's dict as it stands.

    Raises:
      ValueError: no such folder, no or a malformed config.json, or a model not implemented here.
    """
    folder = pathlib.Path(folder)
    require_folder(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: {_without_config(folder)}")
    raw = read_json(folder / "config.json")
    if not isinstance(raw, dict):
        raise ValueError(f"{folder / 'config.json'}: holds {type(raw).__name__}, not a table")
    try:
        config = from_hf(raw, place=str(folder / "config.json"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    if config.tied_embeddings and _has_other_head(read_entries(folder)[0]):
        warnings.warn(f"{folder}: tie_word_embeddings is true, but {HEAD} differs from {EMBED}; "
                      "both are used, as in transformers. Set it to false in config.json, or "
                      f"remove {HEAD}", UserWarning, stacklevel=3)
        config = replace(config, tied_embeddings=False)
    return config, raw


def _has_other_head(entries: Mapping[str, Entry]) -> bool:
    """Whether files hold both an embedding and a head of its shape that differ."""
    embed, head = entries.get(EMBED), entries.get(HEAD)
    if embed is None or head is None or embed.shape != head.shape:
        return False  # a head of another shape is a fault, which `load` names
    if not {embed.dtype, head.dtype} <= set(DTYPES):
        return False
    pairs = zip(tensorfile.read_pieces(embed), tensorfile.read_pieces(head), strict=True)
    return any(not np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True)
               for a, b in pairs)


def _without_config(folder: pathlib.Path) -> str:
    """Say what a folder without config.json holds, and what makes a model of it."""
    path = folder / ADAPTER
    if path.exists():
        raw = read_json(path)
        raw = raw if isinstance(raw, dict) else {}
        base, kind = raw.get("base_model_name_or_path"), raw.get("peft_type")
        what = "a LoRA adapter" if kind in (None, "LORA") else f"an adapter ({kind!r:.40}) of PEFT"
        of = f" of {base!r:.200}" if isinstance(base, str) and base else ""
        return (f"{what}{of}, not a model ({ADAPTER} and no config.json); merge it into its base "
                "with peft's AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
                ".save_pretrained(NEW), save the tokenizer there too, and load NEW")
    if (folder / "params.json").exists():
        return ("not a model folder in the Hugging Face layout (params.json and no config.json: "
                "its authors' own layout); convert it with transformers, or take its hub copy")
    return "not a model folder (it has no config.json)"


def load(folder: str | pathlib.Path, config: ModelConfig | None = None, *, dtype: Any = None,
         mesh: Mesh | None = None, progress: Progress | None = None) -> Params:
    """Read the parameters of a folder.

    Args:
      folder: holds `model.safetensors`, or shards and their index.
      config: the model's shape; read from the folder if None.
      dtype: float32, bfloat16 or float16; each tensor's own if None.
      mesh: spreads the parameters by `sharding.RULES`; each process reads only its own shards.
      progress: called with the bytes read so far and in all.

    Raises:
      ValueError: everything that is wrong with the folder's files, in one message.
    """
    folder = pathlib.Path(folder)
    if config is None:
        config, _ = read_config(folder)
    target = None if dtype is None else np.dtype(dtype)
    if target is not None and target not in DTYPES.values():
        raise ValueError(f"dtype is {target}; parameters are float32, bfloat16 or float16")
    specs, tree = jax.tree.flatten(layout(config))
    entries, faults = _tensors(folder, config)
    _refuse(folder, faults)
    total = sum(entries[spec.file_name].size for spec in specs)
    done, arrays = 0, []

    def read(spec: Spec) -> np.ndarray:
        entry = entries[spec.file_name]
        return tensorfile.read_as(entry, target or DTYPES[entry.dtype]).reshape(spec.shape)

    if mesh is None:
        placed = map(jax.device_put, _ahead(read, specs))
    else:
        fitted = sharding.fit(mesh, config)
        placed = _ahead(lambda s: _place(entries[s.file_name], s, target, fitted), specs)
    for spec, array in zip(specs, placed, strict=True):
        arrays.append(array)
        done += entries[spec.file_name].size
        if progress is not None:
            progress(done, total)
    return jax.tree.unflatten(tree, arrays)


def verify(folder: str | pathlib.Path, sha256: Mapping[str, str] | None = None) -> dict[str, int]:
    """Check a folder's files without loading them: sizes, headers, index, tensors, and hashes.

    Args:
      folder: the folder.
      sha256: hexadecimal digests by file name, to be compared with those of the files.

    Returns:
      The size in bytes of every file of weights, by name.

    Raises:
      ValueError: everything that is wrong, in one message.
    """
    folder = pathlib.Path(folder)
    config, _ = read_config(folder)
    entries, faults = _tensors(folder, config)
    for name, wanted in (sha256 or {}).items():
        try:
            require_file(folder / name)
            with open(folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            faults.append(f"{name}: not readable ({error.strerror})")
            continue
        except ValueError as error:
            faults.append(str(error))
            continue
        if found != wanted.lower():
            faults.append(f"{name}: sha256 is {found}, expected {wanted}")
    _refuse(folder, faults)
    return {path.name: path.stat().st_size for path in sorted({e.path for e in entries.values()})}


def _tensors(folder: pathlib.Path, config: ModelConfig) -> tuple[dict[str, Entry], list[str]]:
    """Find the tensors that a configuration asks for, and everything that is wrong with them."""
    entries, faults = read_entries(folder)
    if config.tied_embeddings and EMBED not in entries and HEAD in entries:
        entries[EMBED] = entries[HEAD]  # some writers keep one name of two that share a tensor
    if entries or not faults:  # a folder that cannot be read at all has said so
        faults += _mismatches(entries, jax.tree.leaves(layout(config)), config)
    if not faults and config.tied_embeddings and _has_other_head(entries):
        faults.append(f"{HEAD}: differs from {EMBED}, but the configuration that was given has "
                      "tied_embeddings=True; use that of read_config")
    return entries, faults


def _refuse(folder: pathlib.Path, faults: list[str]) -> None:
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise ValueError(f"{folder}: {_count(len(faults), 'fault')}\n{listed}")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _mismatches(entries: Mapping[str, Entry], specs: list[Spec], config: ModelConfig) -> list[str]:
    """Compare a folder's tensors with those that the configuration asks for."""
    expected = {spec.file_name: spec for spec in specs}
    faults = []
    if missing := set(expected) - set(entries):
        faults.append(f"missing: {some(missing, 1000)}")
    extra = {name for name in set(entries) - set(expected) if not name.endswith("inv_freq")}
    if config.tied_embeddings and HEAD in extra:
        extra.remove(HEAD)  # some writers keep the tied head's second name
        expected[HEAD] = expected[EMBED]
    if extra:
        faults.append(f"extra: {some(extra, 1000)}")
    for name in sorted(set(expected) & set(entries)):
        entry, shape = entries[name], expected[name].file_shape
        if entry.shape != shape:
            faults.append(f"{name}: shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in DTYPES:
            faults.append(f"{name}: dtype {entry.dtype}; {', '.join(DTYPES)} can be read")
    return faults


def _ahead(read: Callable[[Spec], Any], specs: Iterable[Spec]) -> Iterator[Any]:
    """Yield what `read` makes of each, in order, never more than `READERS` of them ahead."""
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for spec in specs:
            waiting.append(pool.submit(read, spec))
            if len(waiting) > READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _place(entry: Entry, spec: Spec, target: np.dtype | None, mesh: Mesh) -> jax.Array:
    """Read this process's shards of one tensor, each once, to all of its devices that hold it."""
    dtype = target or DTYPES[entry.dtype]
    placed = sharding.weight_sharding(spec.axes, spec.shape, mesh)
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in placed.addressable_devices_indices_map(spec.shape).items():
        ranges = tuple(s.indices(n)[:2] for s, n in zip(index or (), spec.shape, strict=True))
        holders.setdefault(ranges, []).append(device)
    shards = []
    for ranges, devices in holders.items():
        part = tensorfile.read_slice(entry, file_index(spec, list(ranges)))
        part = _cast(part, dtype).reshape([stop - start for start, stop in ranges])
        shards += [jax.device_put(part, device) for device in devices]
    return jax.make_array_from_single_device_arrays(spec.shape, placed, shards)


def file_index(spec: Spec, ranges: list[tuple[int, int]]) -> tuple[slice, ...]:
    """Translate ranges of a parameter's dimensions to slices of its tensor in the file.

    A dimension of the file is one of ours, or several of ours flattened; of those only the first
    may be cut, because heads are split over devices and a head is not.
    """
    out, at = [], 0
    for extent in spec.file_shape:
        first, inner = at, 1
        at += 1
        while spec.shape[first] * inner < extent:
            if ranges[at] != (0, spec.shape[at]):
                raise ValueError(f"{spec.file_name}: a head cannot be split over devices")
            inner *= spec.shape[at]
            at += 1
        out.append(slice(ranges[first][0] * inner, ranges[first][1] * inner))
    return tuple(out)


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if values.dtype == dtype:
        return values
    out = tensorfile.aligned(values.shape, dtype)
    np.copyto(out, values, casting="unsafe")
    return out


def save(folder: str | pathlib.Path, params: Params, config: ModelConfig, *,
         shard_bytes: float = 5e9, extra_config: Mapping[str, Any] | None = None) -> None:
    """Write a folder that transformers loads, and `load` too.

    Every file is written under a temporary name; when all are whole they are renamed, config.json
    last, so that a folder cut short in the making is not taken for a model.

    Args:
      folder: made where it does not exist.
      params: in the dtype that is to be written.
      config: their model's shape.
      shard_bytes: a file grows to this many bytes before another is begun.
      extra_config: entries that are added to config.json.

    Raises:
      ValueError: the parameters do not fit the configuration, or the folder cannot be written to.
    """
    folder = pathlib.Path(folder)
    arrays = named(params, config)
    shards: list[list[str]] = [[]]
    size = 0
    for name, (_, array) in arrays.items():
        if shards[-1] and size + array.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]

    def value(name: str) -> np.ndarray:
        return np.asarray(arrays[name][1])

    files: dict[str, Iterable[Any]] = {}
    for file, held in zip(names, shards, strict=True):
        tensors = {n: (np.dtype(arrays[n][1].dtype), arrays[n][0].file_shape) for n in held}
        files[file] = tensorfile.pieces(tensors, value, {"format": "pt"})
    if len(shards) > 1:
        where = {n: file for file, held in zip(names, shards, strict=True) for n in held}
        total = sum(array.nbytes for _, array in arrays.values())
        files[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": where})
    dtype = np.dtype(next(iter(arrays.values()))[1].dtype).name
    files["config.json"] = _json({**to_hf(config), "dtype": dtype, **(extra_config or {})})
    old = [path.name for path in folder.glob("model*.safetensors*")]
    tensorfile.replace_files(folder, files, [name for name in old if name not in files])


def named(params: Params, config: ModelConfig) -> dict[str, tuple[Spec, jax.Array]]:
    """Pair every parameter with its file's tensor.

    Raises:
      ValueError: a structure, shape or dtype that the configuration or the format does not allow.
    """
    specs, tree = jax.tree.flatten(layout(config))
    arrays, found = jax.tree.flatten(params)
    if found != tree:
        raise ValueError("the parameters have another structure than the configuration describes")
    faults = [
        f"{spec.file_name}: {array.dtype}{list(array.shape)}, expected {list(spec.shape)} in "
        "float32, bfloat16 or float16"
        for spec, array in zip(specs, arrays, strict=True)
        if array.shape != spec.shape or np.dtype(array.dtype) not in DTYPES.values()
    ]
    if faults:
        raise ValueError("the parameters do not fit the configuration: " + "; ".join(faults))
    return {s.file_name: (s, a) for s, a in zip(specs, arrays, strict=True)}


def _json(value: Mapping[str, Any]) -> list[bytes]:
    return [(json.dumps(value, indent=2) + "\n").encode()]
