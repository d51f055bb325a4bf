"""Block-FP8 checkpoints: the entries of one weight, the configuration, and the safetensors files.

The format is the one of DeepSeek-V3's published weights, read by vLLM, SGLang and transformers. A
matrix `X.weight` (N, K) is stored as

    X.weight            (N, K)                          float8_e4m3fn
    X.weight_scale_inv  (ceil(N/128), ceil(K/128))      float32

with weight ~= data * scale_inv: despite its name it is this package's `scale`. (Some published
models have BF16 or FP16 scales, which are read too.) Experts are stored one matrix each.
config.json says so in `quantization_config`, and names the modules whose weights are not FP8. Large
models are split into numbered files with an index.

Source: the DeepSeek-V3 model repository, README_WEIGHTS.md; transformers' FineGrainedFP8Config.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, FP8Tensor, ceil_div
from fp8moe.quant.casts import per_block
from fp8moe.quant.dequantize import dequantize

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SCALE = "_scale_inv"
_SCALE_DTYPES = ("F32", "BF16", "F16")


# ------------------------------------------------------------------------------------- one weight


def scale_name(weight: str) -> str:
    """The name of the scale of the weight "X.weight": "X.weight_scale_inv"."""
    return weight + _SCALE


def stable_per_block(w: torch.Tensor, *, pow2: bool = True) -> FP8Tensor:
    """per_block(dequantize(per_block(w))): the FP8 form that a further round trip keeps.

    The values are those of per_block(w). The bits can differ: where a block's largest element is
    rounded down to exactly half of 448, its values also fit the next smaller power of two, which
    the second cast takes. With pow2 the result survives a copy in BF16 or FP32 and a new cast bit
    for bit; other scales are rounded anew each time.

    Args:
        w: (N, K) or (E, N, K) bfloat16, float16 or float32. Experts are cast one after another, so
            that the FP32 copy in between is that of one.

    Returns: per_block FP8Tensor.
    """
    if w.dim() == 2:
        return per_block(dequantize(per_block(w, pow2=pow2)), pow2=pow2)
    e, n, k = w.shape
    scale_shape = (e, ceil_div(n, BLOCK), ceil_div(k, BLOCK))
    out = FP8Tensor(
        torch.empty(w.shape, dtype=FP8_DTYPE, device=w.device),
        torch.empty(scale_shape, dtype=torch.float32, device=w.device),
    )
    for g in range(e):
        one = stable_per_block(w[g], pow2=pow2)
        out.data[g].copy_(one.data)
        out.scale[g].copy_(one.scale)
    return out


# ---------------------------------------------------------------------------------- configuration


def quantization_config(not_converted: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        not_converted: names of the modules with a matrix that is not FP8.
    """
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": sorted(not_converted),
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: ValueError, naming the file, if it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a whole JSON file ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def check_quantization_config(config: Any) -> None:
    """Raises: ValueError unless this `quantization_config` describes the format above."""
    if not isinstance(config, Mapping):
        found = "a checkpoint without one" if config is None else repr(config)
        raise ValueError(f"quantization_config: expected quant_method 'fp8', got {found}")
    expected = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
    }
    given = {"fmt": "e4m3", "activation_scheme": "dynamic", **config}
    for key, value in expected.items():
        got: Any = given.get(key)
        got = list(got) if isinstance(got, tuple) else got
        if got != value:
            raise ValueError(f"quantization_config.{key}: expected {value!r}, got {got!r}")


# ------------------------------------------------------------------------------------------ files


@contextmanager
def staged_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into that becomes `directory` at the end, or vanishes on an error.

    Raises: FileExistsError if there is something at `directory` already.
    """
    target = Path(directory)
    if target.exists():
        raise FileExistsError(f"directory: expected a path where nothing is yet, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".partial-{os.getpid()}-{target.name}")
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class CheckpointWriter:
    """Tensors, given one by one, to safetensors files of limited size.

    A file is written as soon as the next tensor would not fit, so one file's tensors are what the
    host holds. One file is called model.safetensors; several are numbered and have an index.

    Args:
        directory: an existing folder.
        max_shard_bytes: of the tensors in one file. A larger tensor gets a file of its own.

    Raises: ValueError if max_shard_bytes is not a positive integer; ImportError without
        safetensors.
    """

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
            raise ValueError(
                f"max_shard_bytes: expected a positive integer, got {max_shard_bytes!r}"
            )
        _safetensors()
        self._directory, self._limit = directory, max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Store a copy of `tensor` under a name that is new."""
        if name in self._names:
            raise ValueError(f"{name}: written twice")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._names.add(name)
        # A view would be saved with everything it is a view of.
        self._pending[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        self._pending_bytes += size
        self._total_bytes += size

    def add_fp8(self, name: str, w: FP8Tensor) -> None:
        """Store `X.weight` and its scale."""
        self.add(name, w.data)
        self.add(scale_name(name), w.scale)

    def _flush(self) -> None:
        from safetensors.torch import save_file

        path = self._directory / f"{len(self._shards)}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is left, give the files their final names, and write the index."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            os.rename(self._directory / "0.safetensors", self._directory / _SINGLE)
            return
        weight_map = {}
        for at, names in enumerate(self._shards):
            file = f"model-{at + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self._directory / f"{at}.safetensors", self._directory / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._directory / INDEX).write_text(text, encoding="utf-8")


class Entry(NamedTuple):
    """One tensor, as its file's header describes it; its dtype in the words of safetensors."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def open_safetensors(path: Path) -> Any:
    """The file, its tensors unread. Raises: ValueError, naming it, if it is cut off or another."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


class CheckpointReader:
    """The tensors of a checkpoint folder: all headers at once, each tensor when it is asked for.

    Args:
        directory: with model.safetensors, or with an index and the files that it names.

    Attributes:
        entries: by name.

    Raises: FileNotFoundError for a folder without such files or an index that names a missing one;
        ValueError for an unreadable file and for an index that does not fit its files;
        ImportError without safetensors.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        _safetensors()
        self._files: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        weight_map = self._weight_map()
        files = [_SINGLE] if weight_map is None else sorted(set(weight_map.values()))
        for file in files:
            self._read_headers(file)
        if weight_map is not None:
            for name, file in weight_map.items():
                found = self.entries.get(name)
                if found is None or found.file != file:
                    where = "nowhere" if found is None else f"in {found.file}"
                    raise ValueError(f"{INDEX}: {name} is said to be in {file}, but is {where}")

    def _weight_map(self) -> dict[str, str] | None:
        index = self._directory / INDEX
        if (self._directory / _SINGLE).is_file():
            return None
        if not index.is_file():
            raise FileNotFoundError(
                f"directory: expected {_SINGLE} or {INDEX} in {self._directory}, found neither"
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: expected a weight_map of tensors to files, got none")
        return weight_map

    def _read_headers(self, file: str) -> None:
        path = self._directory / file
        if not path.is_file():
            raise FileNotFoundError(f"{INDEX}: expected {file} in {self._directory}, found none")
        self._files[file] = opened = open_safetensors(path)
        for name in opened.keys():
            part = opened.get_slice(name)
            self.entries[name] = Entry(file, part.get_dtype(), tuple(part.get_shape()))

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU."""
        return self._files[self.entries[name].file].get_tensor(name)

    def read_fp8(self, name: str, device: torch.device | str | None = None) -> FP8Tensor:
        """`X.weight` and its scale in float32, as `fp8_problem` has found them right."""
        data, scale = self.read(name), self.read(scale_name(name)).float()
        return FP8Tensor(data.to(device), scale.to(device))

    def is_fp8(self, name: str) -> bool:
        entry = self.entries.get(name)
        return entry is not None and entry.dtype == "F8_E4M3"

    def fp8_problem(self, name: str, shape: tuple[int, ...]) -> str | None:
        """What keeps `name` from being an FP8 weight of this shape; None if it is one.

        Reads the scale, which must be finite and not negative.
        """
        entry = self.entries.get(name)
        if entry is None:
            return f"{name}: missing"
        if entry.dtype != "F8_E4M3":
            return f"{name}: expected dtype F8_E4M3, got {entry.dtype}"
        if entry.shape != shape:
            return f"{name}: expected shape {shape}, got {entry.shape}"
        scale = self.entries.get(scale_name(name))
        if scale is None:
            return f"{scale_name(name)}: missing, the scale of an FP8 weight"
        if scale.dtype not in _SCALE_DTYPES:
            expected = " or ".join(_SCALE_DTYPES)
            return f"{scale_name(name)}: expected dtype {expected}, got {scale.dtype}"
        blocks = (ceil_div(shape[0], BLOCK), ceil_div(shape[1], BLOCK))
        if scale.shape != blocks:
            return (
                f"{scale_name(name)}: expected shape {blocks} for 128 x 128 blocks of {shape}, "
                f"got {scale.shape}"
            )
        values = self.read(scale_name(name))
        if not bool((values.isfinite() & (values >= 0)).all()):
            return f"{scale_name(name)}: expected finite scales that are not negative"
        return None


def _safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError("FP8 checkpoints need safetensors: pip install 'fp8moe[hf]'") from error


__all__ = [
    "CONFIG",
    "INDEX",
    "CheckpointReader",
    "CheckpointWriter",
    "Entry",
    "check_quantization_config",
    "open_safetensors",
    "quantization_config",
    "read_json",
    "scale_name",
    "stable_per_block",
    "staged_directory",
]
