"""Open other programs' weight files, look at them first, and read one tensor at a time.

Files are data. PyTorch files go through ``torch.load(weights_only=True)`` and never through anything
else, safetensors through ``safetensors``; what a file is, is decided from its first bytes before
PyTorch sees it, so that a web page, a Git-LFS pointer or half a download gets its own clear line.

Memory stays bounded by one tensor: pages of a mapped file count as resident until it is unmapped, so
safetensors are opened anew for each tensor and PyTorch's mapping is dropped after half a gigabyte.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from mgpt4_jax.errors import UserError

FLOAT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64"}
_LEGACY_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # pickled magic number of old torch.save
REMAP_BYTES = 1 << 29
_MOST_HEADER = 100_000_000  # bytes; safetensors has the same limit
_OLDEST_TORCH = (2, 10)  # earlier ones have known holes in weights_only (CVE-2026-24747)
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
AGAIN = "download it again"


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def num_bytes(self) -> int:
        width = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}
        return int(np.prod(self.shape, dtype=np.int64)) * width.get(self.dtype, 1)


class Source(Protocol):
    """Named tensors of one file or of one directory of shards."""

    kind: str  # torch, torch-legacy, safetensors, huggingface, sum
    wrapper: tuple[str, ...]  # what a training run saved beside {"model": ...}

    @property
    def path(self) -> Path: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def config(self) -> dict[str, Any] | None:
        """``config.json`` of a Hugging Face directory."""
        ...

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shapes and dtypes by name, in the order of the file."""
        ...

    def read(self, key: str) -> np.ndarray:
        """The tensor in the file's dtype (bfloat16 as ``ml_dtypes.bfloat16``)."""
        ...


def open_source(path: Path | str) -> Source:
    """A ``.pth``/``.bin``/``.pt`` or ``.safetensors`` file, or a Hugging Face directory.

    Raises ``UserError`` when the path is anything else: missing, empty, a web page, truncated, unsafe.
    """
    path = Path(path)
    if path.is_dir():
        return HuggingFaceDirectory(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    return open_file(path)


def open_file(path: Path) -> Source:
    kind = sniff(path)
    return SafetensorsFile(path) if kind == "safetensors" else TorchFile(path, kind)


def sniff(path: Path) -> str:
    """``torch``, ``torch-legacy`` or ``safetensors``, from the bytes alone; else ``UserError``."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        raise UserError(f"{path}: is empty (0 bytes); {AGAIN}")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git-LFS pointer, not the weights; run `git lfs pull` where it came from")
    if re.match(rb"\s*<(!doctype|html|head|\?xml|!--)", head, re.IGNORECASE):
        raise UserError(f"{path}: is a web page (HTML), not weights; {AGAIN} and check the link")
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return "torch"
    if head.startswith(_LEGACY_TORCH):
        return "torch-legacy"
    if head[8:9] == b"{":
        _check_safetensors(path, size, int.from_bytes(head[:8], "little"))
        return "safetensors"
    if head.startswith(b"\x80"):
        raise UserError(
            f"{path}: is a plain Python pickle, which could run code; save it with torch.save or safetensors"
        )
    raise UserError(f"{path}: is neither a PyTorch nor a safetensors file (it begins with {head[:12]!r})")


def _check_zip(path: Path) -> None:
    """The directory of the archive is whole, and its members are plain stored files under one folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{path}: is truncated or damaged (no archive directory at its end); {AGAIN}") from error
    names = [member.filename for member in members]
    for name in names:
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name:
            raise UserError(f"{path}: the archive names a path outside itself ({name!r}); refused")
    if not any(name.endswith("/data.pkl") for name in names):
        raise UserError(f"{path}: is a zip archive but not a PyTorch file (no data.pkl in it)")
    if any(name.endswith("/constants.pkl") for name in names):
        raise UserError(f"{path}: is a TorchScript program, not weights; save its state_dict() with torch.save")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError(
            f"{path}: the archive is compressed, which torch.save never does; save it again with torch.save"
        )


def _check_safetensors(path: Path, size: int, header_size: int) -> None:
    if 8 + header_size > size:
        raise UserError(f"{path}: is truncated ({size} bytes, its header alone has {8 + header_size}); {AGAIN}")
    if header_size > _MOST_HEADER:
        raise UserError(f"{path}: its safetensors header claims {header_size} bytes; {AGAIN}")
    with path.open("rb") as file:
        file.seek(8)
        try:
            header = json.loads(file.read(header_size))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise UserError(f"{path}: its safetensors header is damaged; {AGAIN}") from error
    expected = 8 + header_size + max(ends, default=0)
    if size < expected:
        raise UserError(f"{path}: is truncated ({size} bytes of {expected}); {AGAIN}")


@dataclass
class SafetensorsFile:
    path: Path
    kind: str = "safetensors"
    wrapper: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    _infos: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def tensors(self) -> Mapping[str, TensorInfo]:
        if not self._infos:
            with self._open() as file:
                for key in file.offset_keys():
                    part = file.get_slice(key)
                    dtype = part.get_dtype()
                    name = _SAFETENSORS_DTYPES.get(dtype, dtype.lower())
                    self._infos[key] = TensorInfo(tuple(part.get_shape()), name, self.path)
        return self._infos

    def read(self, key: str) -> np.ndarray:
        with self._open() as file:
            return file.get_tensor(key)

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, "np")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: safetensors refuses it ({error}); {AGAIN}") from error


@dataclass
class TorchFile:
    """``{name: tensor}``, or ``{"model": {name: tensor}, "optimizer": ..., ...}`` of a training run.

    Files of ``torch.save`` before 1.6 (kind ``torch-legacy``) cannot be mapped: PyTorch reads them whole.
    """

    path: Path
    kind: str = "torch"
    wrapper: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    _infos: dict[str, TensorInfo] = field(default_factory=dict)
    _state: dict[str, Any] | None = None
    _bytes_mapped: int = 0

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def tensors(self) -> Mapping[str, TensorInfo]:
        if not self._infos:
            for key, tensor in self._load().items():
                name = str(tensor.dtype).removeprefix("torch.")
                self._infos[key] = TensorInfo(tuple(tensor.shape), name, self.path)
        return self._infos

    def read(self, key: str) -> np.ndarray:
        import torch

        tensor = self._load()[key].detach().contiguous()
        self._bytes_mapped += tensor.numel() * tensor.element_size()
        if self.kind == "torch" and self._bytes_mapped > REMAP_BYTES:
            self._state, self._bytes_mapped = None, 0
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def _load(self) -> dict[str, Any]:
        if self._state is None:
            self._state = self._unwrap(load_torch(self.path, mmap=self.kind == "torch"))
        return self._state

    def _unwrap(self, saved: Any) -> dict[str, Any]:
        import torch

        if not isinstance(saved, Mapping):
            raise UserError(f"{self.path}: holds a {type(saved).__name__}, not a dict of named tensors")
        if isinstance(saved.get("model"), Mapping):
            self.wrapper = tuple(key for key in saved if key != "model")
            saved = saved["model"]
        for key, value in saved.items():
            if not isinstance(key, str) or not isinstance(value, torch.Tensor):
                raise UserError(
                    f"{self.path}: {key!r} is a {type(value).__name__}, not a tensor; is this a checkpoint?"
                )
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise UserError(f"{self.path}: {key} is a sparse, quantised or empty (meta) tensor; save it dense")
        return dict(saved)


def load_torch(path: Path, *, mmap: bool) -> Any:
    """``torch.load`` that executes nothing; every failure is one line."""
    torch = import_torch(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises pickle, runtime, zip, key and type errors on damaged files
        text = str(error)
        if blocked := re.search(r"GLOBAL ([\w.]+)", text):
            raise UserError(
                f"{path}: holds the Python object {blocked[1]}, which could run code; nothing was executed. "
                "Save only its tensors, on a machine you can afford to lose: torch.save({'model': ...})"
            ) from error
        reason = text.splitlines()[0][:160] if text else type(error).__name__
        raise UserError(f"{path}: is damaged or no checkpoint ({reason}); {AGAIN}") from error


def import_torch(path: Path | str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: needs PyTorch to be read or written; install the extra mgpt4-jax[convert]") from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _OLDEST_TORCH:
        raise UserError(f"PyTorch {torch.__version__} has known holes in safe loading; install torch>=2.10")
    return torch


@dataclass
class HuggingFaceDirectory:
    """``config.json`` and the weights: one file, or shards that an index lists."""

    path: Path
    kind: str = "huggingface"
    wrapper: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    _shards: tuple[Source, ...] = ()
    _owner: dict[str, Source] = field(default_factory=dict)
    _infos: dict[str, TensorInfo] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = read_json(self.path / "config.json")
        weight_map, names = _shard_names(self.path)
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{self.path / missing[0]}: this shard is missing{more}; {AGAIN}")
        self._shards = tuple(open_file(self.path / name) for name in names)
        for shard in self._shards:
            for key, info in shard.tensors().items():
                if key in self._owner:
                    raise UserError(f"{shard.path}: {key} stands in {self._owner[key].path.name} too")
                self._owner[key], self._infos[key] = shard, info
        if absent := [key for key in weight_map if key not in self._owner]:
            raise UserError(f"{self.path / weight_map[absent[0]]}: lacks {absent[0]}, which the index puts there")

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(shard.path for shard in self._shards)

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, key: str) -> np.ndarray:
        return self._owner[key].read(key)


def _shard_names(directory: Path) -> tuple[dict[str, str], list[str]]:
    """(tensor -> shard of the index, or nothing without one; the files in order)."""
    for name in _INDEXES:
        if (directory / name).exists():
            weight_map = (read_json(directory / name) or {}).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{directory / name}: has no weight_map; {AGAIN}")
            named = weight_map.values()
            if unsafe := [shard for shard in named if not isinstance(shard, str) or Path(shard).name != shard]:
                raise UserError(f"{directory / name}: names a file outside the directory ({unsafe[0]!r}); refused")
            return weight_map, sorted(set(named))
    for name in _SINGLE:
        if (directory / name).exists():
            return {}, [name]
    if shards := sorted(path.name for path in directory.glob("*-of-*") if path.suffix in (".bin", ".safetensors")):
        raise UserError(f"{directory}: has {shards[0]} but no index; one of {', '.join(_INDEXES)} is missing")
    raise UserError(f"{directory}: holds no weights; looked for {', '.join(_SINGLE + _INDEXES)}")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is no file; ``UserError`` if it is damaged."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        pointer = path.read_bytes().startswith(b"version https://git-lfs")
        reason = "is a Git-LFS pointer; run `git lfs pull`" if pointer else f"is not valid JSON; {AGAIN}"
        raise UserError(f"{path}: {reason}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a JSON object; {AGAIN}")
    return values


@dataclass
class SumSource:
    """Delta weights and their base, added tensor by tensor (FastChat ``apply_delta.py``).

    Rows that only the delta has (the pad token of Vicuna v0: 32000 -> 32001) are added to zero. The sum
    is taken in the delta's dtype, as the original does.
    """

    base: Source
    delta: Source
    kind: str = "sum"
    wrapper: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        buffers = re.compile(r"rotary_emb\.inv_freq$")
        mine, theirs = ({k for k in source.tensors() if not buffers.search(k)} for source in (self.base, self.delta))
        if odd := sorted(mine ^ theirs):
            lacking = self.delta if odd[0] in mine else self.base
            raise UserError(f"{lacking.path}: lacks {odd[0]}; base and delta must hold the same tensors")
        self._shared = theirs
        for key in theirs:
            small, large = self.base.tensors()[key].shape, self.delta.tensors()[key].shape
            grown = len(small) == len(large) == 2 and small[1:] == large[1:] and small[0] <= large[0]
            if small != large and not grown:
                raise UserError(f"{self.delta.path}: {key} is {list(large)}, in the base {list(small)}; not its delta")

    @property
    def path(self) -> Path:
        return self.delta.path

    @property
    def config(self) -> dict[str, Any] | None:
        return self.delta.config

    @property
    def files(self) -> tuple[Path, ...]:
        return self.base.files + self.delta.files

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.delta.tensors()

    def read(self, key: str) -> np.ndarray:
        delta = self.delta.read(key)
        if key not in self._shared:
            return delta
        total = np.array(delta, np.float32)
        base = self.base.read(key).astype(delta.dtype, copy=False)
        total[: base.shape[0]] += base.astype(np.float32, copy=False)
        return total.astype(delta.dtype, copy=False)
