"""Model directories: ``model.json``, ``params/`` and the tokenisers. Nothing in them is pickled.

``params/`` is an Orbax checkpoint (zarr3, one array a parameter, stacked layers). It is written slice by
slice through TensorStore, the library under Orbax: handing Orbax a whole stacked parameter takes three
times its size in memory, and a 7B parameter is 2.9 GB. A chunk holds one layer and carries a checksum,
so a layer can be read alone and an altered file is refused by name. Orbax restores the same directory.

What training writes holds the trained parameters alone, a few megabytes, and names its base, the whole model that
holds the others. Every reader here follows it there, and refuses a base that has changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tensorstore
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from mgpt4_jax.config import ModelConfig, model_config_from_dict, model_config_to_dict
from mgpt4_jax.errors import UserError
from mgpt4_jax.models import abstract_params
from mgpt4_jax.sharding import param_shardings
from mgpt4_jax.typing import DType

FORMAT_VERSION = 1
FORMAT_VERSION_WITH_BASE = 2  # programs that know no bases refuse it
_STACKS = (
    "vit/blocks/",
    "qformer/layers/",
    "llama/layers/",
    "opt/layers/",
    "t5/encoder/layers/",
    "t5/decoder/layers/",
)
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class SourceFile:
    """A file that a model was converted from."""

    role: str  # vit, qformer, llm, llm_delta, projection, model
    name: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Base:
    """The whole model that a trained one stands on, and what of it is used."""

    path: str  # from the directory of the trained model, or absolute
    leaves: dict[str, str]  # parameter path -> checksum of what the base stores (``stored_checksum``)


@dataclass(frozen=True)
class ModelManifest:
    """What ``model.json`` says."""

    config: ModelConfig
    template: str
    num_parameters: int
    dtypes: dict[str, str]  # parameter path -> dtype on disk
    sources: tuple[SourceFile, ...] = ()
    base: Base | None = None

    @property
    def trained(self) -> tuple[str, ...]:
        """Parameters that training has changed since the conversion; none of a whole model."""
        return () if self.base is None else tuple(path for path in self.dtypes if path not in self.base.leaves)

    def write(self, model_dir: Path) -> None:
        values = {
            "format_version": FORMAT_VERSION if self.base is None else FORMAT_VERSION_WITH_BASE,
            "config": model_config_to_dict(self.config),
            "template": self.template,
            "num_parameters": self.num_parameters,
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "dtypes": self.dtypes,
        }
        if self.base is not None:
            values["base"] = dataclasses.asdict(self.base)
        (model_dir / "model.json").write_text(json.dumps(values, indent=1) + "\n")


def read_manifest(model_dir: Path | str) -> ModelManifest:
    """Raises ``UserError`` when this is not a model directory of a version that we read."""
    path = Path(model_dir) / "model.json"
    if not path.is_file():
        raise UserError(f"{model_dir}: not a model directory (no model.json); `mgpt4 convert` makes one")
    try:
        values = json.loads(path.read_text())
        if (version := values["format_version"]) not in (FORMAT_VERSION, FORMAT_VERSION_WITH_BASE):
            raise UserError(f"{path}: format version {version}, this program reads up to {FORMAT_VERSION_WITH_BASE}")
        manifest = ModelManifest(
            config=model_config_from_dict(values["config"]),
            template=values["template"],
            num_parameters=values["num_parameters"],
            dtypes=values["dtypes"],
            sources=tuple(SourceFile(**source) for source in values["sources"]),
            base=Base(**values["base"]) if version == FORMAT_VERSION_WITH_BASE else None,
        )
        known = all(name in _DTYPES and ".." not in leaf.split("/") for leaf, name in manifest.dtypes.items())
        if not known or type(manifest.template) is not str or type(manifest.num_parameters) is not int:
            raise ValueError("dtypes, template or num_parameters")
        if (base := manifest.base) is not None and not (
            type(base.path) is str and set(base.leaves) <= set(values["dtypes"])
        ):
            raise ValueError("base")
        return manifest
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({repr(error)[:120]}); convert the model again") from error


@contextlib.contextmanager
def new_directory(
    out: Path | str, *, overwrite: bool = False, marks: tuple[str, ...] = ("model.json",)
) -> Iterator[Path]:
    """A directory beside ``out`` that takes its name only when the block succeeds; else nothing is left.

    With ``overwrite`` an earlier result is replaced, which is told by one of the files ``marks``.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists already; choose another name or pass --overwrite")
    if out.exists() and not any((out / mark).is_file() for mark in marks):
        raise UserError(
            f"{out}: is no earlier result (no {marks[0]} in it), so it is not replaced; choose another name"
        )
    whole = out.absolute()
    partial = whole.with_name(f"{whole.name}.partial")
    with _alone(partial, out):
        try:
            yield partial
            if out.exists():
                old = Path(tempfile.mkdtemp(prefix=f"{whole.name}.replaced-", dir=whole.parent))
                out.rename(old)
                partial.rename(out)
                shutil.rmtree(old)
            else:
                partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _alone(partial: Path, out: Path) -> Iterator[None]:
    """``partial``, empty and locked against a second run; what a killed one left is removed."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}: {error.filename})") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another run is writing it; wait for it or choose another name") from error
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield
    finally:
        os.close(lock)


class LeafWriter:
    """One parameter on disk, written whole or one stacked layer at a time."""

    def __init__(self, store: tensorstore.TensorStore):
        self._store = store
        self._pending: Any = None

    def write(self, layer: int | None, values: np.ndarray) -> None:
        """``layer`` indexes the leading axis; None writes everything. One write is in flight at a time."""
        target = self._store if layer is None else self._store[layer]
        if tuple(values.shape) != tuple(target.shape):
            raise ValueError(f"expected shape {tuple(target.shape)}, got {values.shape}")
        self.flush()
        self._pending = target.write(np.asarray(values, order="C"))  # keeps a scalar a scalar

    def flush(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


class ParamsWriter:
    """Writes the ``params`` folder of a model directory, in bounded memory."""

    def __init__(self, model_dir: Path):
        self.dtypes: dict[str, str] = {}
        self._params_dir = model_dir / "params"
        self._params_dir.mkdir(parents=True)

    def create(self, path: str, shape: tuple[int, ...], dtype: DType) -> LeafWriter:
        """Room for the parameter ``path`` ("llama/norm/scale"); a stacked one is cut into layers."""
        name = jnp.dtype(dtype).name
        if name not in _DTYPES:
            raise UserError(f"{path}: dtype {name} cannot be stored; use one of {', '.join(_DTYPES)}")
        chunk = (1, *shape[1:]) if is_stacked(path) else shape
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        metadata = {
            "shape": shape,
            "data_type": name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": codecs,
        }
        spec = _spec(self._params_dir, path) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
        self.dtypes[path] = name
        return LeafWriter(tensorstore.open(spec, create=True).result())

    def finish(self) -> None:
        """Add Orbax's own description of the tree, so that Orbax restores the folder too."""
        import orbax.checkpoint as ocp

        here = jax.process_index()  # Orbax would wait for every host of a run, and one host writes
        alone = ocp.options.MultiprocessingOptions(here, {here}, barrier_sync_key_prefix="described")

        tree = nest({path: np.zeros((), _DTYPES[name]) for path, name in self.dtypes.items()})
        described = self._params_dir.with_name("params.described")
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(described.resolve(), args=ocp.args.PyTreeSave(tree))
        for file in described.iterdir():
            if file.is_file():
                file.rename(self._params_dir / file.name)
        shutil.rmtree(described)


def write_model(model_dir: Path, params: Any, manifest_fields: dict[str, Any]) -> None:
    """Write a whole tree that is in memory (a trained or random model) and its ``model.json``."""
    writer = ParamsWriter(model_dir)
    for path, leaf in flatten(params).items():
        slot = writer.create(path, leaf.shape, leaf.dtype)
        slot.write(None, np.asarray(leaf))
        slot.flush()
    writer.finish()
    ModelManifest(dtypes=writer.dtypes, **manifest_fields).write(model_dir)


def write_trained_model(
    out: Path | str, base_dir: Path | str, trained: Mapping[str, Any], config: ModelConfig, template: str
) -> None:
    """A model directory of the parameters ``trained`` (by path) alone; ``base_dir`` gives the others of ``config``.

    An earlier one of that kind is replaced, a whole model never. If ``base_dir`` was trained itself, what it had
    changed is copied and the new one stands on its base. All hosts of a run must call it; the first one writes.
    """
    out, base_dir = Path(out), Path(base_dir)
    manifest = read_manifest(base_dir)
    if (out / "model.json").is_file() and read_manifest(out).base is None:
        raise UserError(f"{out}: holds a whole model, which a trained one does not replace; choose another name")
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract_params(config)).items()}
    _check_trained(trained, shapes, manifest, base_dir)
    if jax.process_index() != 0:
        for path, leaf in trained.items():
            list(_rows(path, leaf))  # gathering is a work of all hosts
        return
    copied = [path for path in manifest.trained if path not in trained]
    with new_directory(out, overwrite=True) as partial:
        writer = ParamsWriter(partial)
        for path, leaf in (*trained.items(), *((path, read_leaf(base_dir, path)) for path in copied)):
            slot = writer.create(path, leaf.shape, leaf.dtype)
            for row, values in _rows(path, leaf):
                slot.write(row, values)
            slot.flush()
        writer.finish()
        for name in ("tokenizer", "qformer_tokenizer"):
            if (base_dir / name).is_dir():
                shutil.copytree(base_dir / name, partial / name)
        ModelManifest(
            config=config,
            template=template,
            num_parameters=sum(math.prod(shape) for shape in shapes.values()),
            dtypes={path: writer.dtypes.get(path) or manifest.dtypes[path] for path in shapes},
            sources=manifest.sources,
            base=_base_of(out, base_dir, manifest, shapes.keys() - writer.dtypes.keys()),
        ).write(partial)


def _check_trained(
    trained: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], manifest: ModelManifest, base_dir: Path
) -> None:
    """What was trained and the base make the model of these ``shapes``, nothing missing and nothing over."""
    given = {path: tuple(leaf.shape) for path, leaf in trained.items()}
    if wrong := [path for path, shape in given.items() if shapes.get(path) != shape]:
        raise UserError(f"{wrong[0]} was trained with shape {given[wrong[0]]}, the model has {shapes.get(wrong[0])}")
    if difference := sorted(set(shapes) ^ (set(manifest.dtypes) | set(given))):
        raise UserError(f"{base_dir}: is no base of the trained model: they differ in {difference[0]}")


def _rows(path: str, leaf: Any) -> Iterator[tuple[int | None, np.ndarray]]:
    """A parameter on this host, a layer at a time if it is stacked; it may lie on the devices of several."""

    def fetch(part: Any) -> np.ndarray:
        if isinstance(part, jax.Array) and not part.is_fully_addressable:
            return multihost_utils.process_allgather(part, tiled=True)
        return np.asarray(part)

    if not is_stacked(path):
        yield None, fetch(leaf)
    else:
        yield from ((row, fetch(leaf[row])) for row in range(leaf.shape[0]))


def _base_of(out: Path, base_dir: Path, manifest: ModelManifest, paths: set[str]) -> Base:
    """Always a whole model: of one that was trained itself its own base."""
    home = base_dir if manifest.base is None else find_base(base_dir, manifest.base)
    leaves = {path: stored_checksum(home, path) for path in sorted(paths)}
    home, place = home.resolve(), out.absolute().resolve()
    is_near = len(Path(os.path.commonpath([home, place])).parts) > 1  # something besides the root
    return Base(os.path.relpath(home, place) if is_near else str(home), leaves)


def find_base(model_dir: Path, base: Base) -> Path:
    """The directory of the base, which must hold what it held when ``model_dir`` was written."""
    home = (model_dir.resolve() / base.path).resolve()
    if _stamp(home) is None:
        raise UserError(
            f"{model_dir}: its base {home} is not there; put it back, or write where it is as the path of base in "
            f"{model_dir}/model.json"
        )
    _check_base(model_dir, home, (_stamp(model_dir), _stamp(home)))
    return home


def _stamp(model_dir: Path) -> tuple[int, ...] | None:
    """Tells one ``model.json`` from the next; None if there is none."""
    try:
        stat = (model_dir / "model.json").stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=16)
def _check_base(model_dir: Path, home: Path, stamps: Any) -> None:
    """Looked at once, unless one of the two directories is written again."""
    for path, checksum in read_manifest(model_dir).base.leaves.items():
        if stored_checksum(home, path) != checksum:
            raise UserError(
                f"{home}: {path} has changed since {model_dir} was trained on it; put back the model that it was"
            )


def stored_checksum(model_dir: Path, path: str) -> str:
    """Digest of a stored parameter's shape, dtype and values: of the checksum at the end of each chunk.

    No value is read: that a chunk has its checksum is seen when it is.
    """
    folder, digest = model_dir / "params" / path.replace("/", "."), hashlib.blake2b(digest_size=16)
    try:
        stored = json.loads((folder / "zarr.json").read_text())
        if stored["codecs"][-1]["name"] != "crc32c":
            raise ValueError("its chunks carry no checksums")
        digest.update(json.dumps([stored[key] for key in ("shape", "data_type", "chunk_grid")]).encode())
        for chunk in sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "zarr.json"):
            with chunk.open("rb") as file:
                file.seek(-4, os.SEEK_END)
                digest.update(f"{chunk.relative_to(folder)} {chunk.stat().st_size} ".encode() + file.read())
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(model_dir, path, error) from error
    return digest.hexdigest()


def _home(model_dir: Path, path: str) -> Path:
    """The directory that holds a parameter: ``model_dir`` itself or its base."""
    stamp = _stamp(model_dir)
    base = None if stamp is None else _read_base(model_dir, stamp)
    return model_dir if base is None or path not in base.leaves else find_base(model_dir, base)


@functools.lru_cache(maxsize=16)
def _read_base(model_dir: Path, stamp: Any) -> Base | None:
    return read_manifest(model_dir).base


def read_leaf(model_dir: Path | str, path: str, layer: int | None = None) -> np.ndarray:
    """One parameter, or one layer of a stacked one, in the dtype on disk."""
    home = _home(Path(model_dir), path)
    store = _open(home, path)
    return _read(store if layer is None else store[layer], home, path)


def load_params(
    model_dir: Path | str,
    dtype: DType | Callable[[str], DType] | None = None,
    mesh: Mesh | None = None,
    *,
    without: str | None = None,
) -> dict[str, Any]:
    """The tree (but for the part ``without``), cut over ``mesh`` if there is one.

    ``dtype`` may be a function of the path; None leaves it as on disk. Each device's part is read on its own, so
    no process holds more than its share and one slice.
    """
    manifest = read_manifest(model_dir)
    expected = flatten(abstract_params(manifest.config))
    if difference := sorted(set(expected) ^ set(manifest.dtypes)):
        raise UserError(f"{model_dir}/model.json: parameters do not fit the configuration, first {difference[0]}")
    single = SingleDeviceSharding(jax.devices()[0])
    shardings = flatten(param_shardings(manifest.config, mesh)) if mesh else dict.fromkeys(expected, single)

    def load(path: str) -> jax.Array:
        home = _home(Path(model_dir), path)
        store = _open(home, path)
        if tuple(store.shape) != expected[path].shape:
            raise UserError(f"{home}: {path} has shape {store.shape}, expected {expected[path].shape}")
        wanted: DType = (dtype(path) if isinstance(dtype, types.FunctionType) else dtype) or manifest.dtypes[path]

        def part(index: tuple[slice, ...]) -> np.ndarray:
            return _read(store[index], home, path).astype(wanted, copy=False)

        return jax.make_array_from_callback(expected[path].shape, shardings[path], part)

    return nest({path: load(path) for path in expected if path.split("/")[0] != without})


def is_stacked(path: str) -> bool:
    """Whether the leading axis of a parameter counts layers."""
    return path.startswith(_STACKS)


def flatten(tree: Any) -> dict[str, Any]:
    """``{"llama/norm/scale": leaf}``, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten``."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _spec(params_dir: Path, path: str) -> dict[str, Any]:
    # tensorstore takes no ".." in a path
    kvstore = {"driver": "file", "path": str(params_dir.resolve() / path.replace("/", "."))}
    return {"driver": "zarr3", "kvstore": kvstore}


def _open(model_dir: Path, path: str) -> tensorstore.TensorStore:
    try:
        # Without this a chunk file that is gone would read as zeros; hence zeros are always stored.
        return tensorstore.open(_spec(model_dir / "params", path) | {"fill_missing_data_reads": False}).result()
    except (ValueError, OSError) as error:
        raise _damaged(model_dir, path, error) from error


def _read(store: tensorstore.TensorStore, model_dir: Path | str, path: str) -> np.ndarray:
    try:
        return store.read().result()
    except (ValueError, OSError) as error:
        raise _damaged(model_dir, path, error) from error


def _damaged(model_dir: Path | str, path: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0][:200]
    return UserError(f"{model_dir}: parameter {path} is missing or damaged, convert the model again ({reason})")
