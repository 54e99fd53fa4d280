"""From a model directory back to the files of the original programs: the same tables, read backwards.

* ``minigpt4``: the ``.pth`` that MiniGPT-4 saves and loads, ``{"model": {llama_proj.weight, llama_proj.bias}}``,
  with LoRA adapters as MiniGPT-v2 saves them
* ``lavis``: a directory with ``eva_vit_g.pth``, ``blip2_pretrained.pth`` (with the projection of BLIP-2 and
  InstructBLIP) and ``pretrained_minigpt4.pth``, of which a model has what it has
* ``hf``: a Hugging Face directory: LLaMA, OPT, T5, Blip2ForImageTextRetrieval, Blip2ForConditionalGeneration,
  InstructBlip, and MiniGPT-4 with a Q-Former as Blip2ForConditionalGeneration with a LLaMA inside; LoRA adapters
  are merged into it
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mgpt4_jax.checkpoint import ModelManifest, new_directory, read_leaf, read_manifest
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.errors import UserError
from mgpt4_jax.models.lora import merging

from . import eva, language, llama, lora, qformer
from .hf_config import export_config
from .huggingface import LANGUAGE
from .readers import import_torch
from .rules import Alias, Entry, Rule, Table, read_back

FORMATS = ("minigpt4", "lavis", "hf")
_SHARD_BYTES = 2 << 30  # what one shard may hold is what memory must hold
Progress = Callable[[int, int], None]
Tensors = Mapping[str, tuple[Rule, Callable[[], np.ndarray]]]


def export(
    model_dir: str | Path,
    *,
    format: str,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Write ``model_dir`` in the layout of another program; gives the files written.

    ``out`` is a file for ``minigpt4`` and a directory for the others. It appears whole or not at all.
    Raises ``UserError`` when the model has no home in that format.
    """
    model_dir, out = Path(model_dir), Path(out)
    if format not in FORMATS:
        raise UserError(f"--format {format!r}: choose one of {', '.join(FORMATS)}")
    manifest = read_manifest(model_dir)
    if out.resolve().is_relative_to(model_dir.resolve()):
        raise UserError(f"{out}: lies in the model directory itself; choose another --out")
    if format == "minigpt4":
        return [_export_minigpt4(model_dir, manifest, out, overwrite)]
    if format == "lavis":
        tables = lavis_tables(model_dir, manifest)
        import_torch(out)
        with new_directory(out, marks=tuple(tables), overwrite=overwrite) as partial:
            for done, (name, table) in enumerate(tables.items()):
                tensors = read_back(table, functools.partial(read_leaf, model_dir))
                save_torch(partial / name, _state(table, tensors), wrapped=name != "eva_vit_g.pth")
                if progress is not None:
                    progress(done + 1, len(tables))
        return [out / name for name in tables]
    return _export_hugging_face(model_dir, manifest, out, overwrite, progress)


def _export_minigpt4(model_dir: Path, manifest: ModelManifest, out: Path, overwrite: bool) -> Path:
    if manifest.config.architecture != "minigpt4":
        raise UserError(f"{model_dir}: is no MiniGPT-4 but {manifest.config.architecture}; try --format hf or lavis")
    if out.is_dir() or (out.exists() and not overwrite):
        raise UserError(f"{out}: exists already; choose another name or pass --overwrite")
    table = trained_table(manifest.config)
    tensors = read_back(table, functools.partial(read_leaf, model_dir))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_torch(out, _state(table, tensors), wrapped=True)
    return out


def trained_table(config: ModelConfig) -> list[Entry]:
    """What a checkpoint of training holds: the projection and, as in MiniGPT-v2, the adapters."""
    kind = language.kind_of(config.language_model)
    name = language.PROJECTIONS[kind][config.architecture == "instructblip"]
    if config.llama is None or config.llama.lora is None:
        return projection_table(config, name)
    return [*projection_table(config, name), *lora.lora(config.llama, lora.ROOT.format(name.removesuffix("_proj")))]


def projection_table(config: ModelConfig, name: str) -> list[Entry]:
    if config.qformer is not None:
        inputs = config.qformer.hidden_size
    else:
        inputs = config.patches_per_token * config.vit.hidden_size
    return llama.projection(name, inputs, config.language_model.hidden_size)


def lavis_tables(model_dir: Path, manifest: ModelManifest) -> Mapping[str, Table]:
    """File name -> its table, for the sides that the model has."""
    config = manifest.config
    tables: dict[str, list[Entry]] = {}
    if config.vit is not None:
        vit = config.vit
        tables["eva_vit_g.pth"] = eva.lavis_vit(vit, source_grid=vit.grid_size, source_layers=vit.num_layers)
    reader: list[Entry] = [] if config.qformer is None else qformer.lavis_qformer(config.qformer)
    if config.vit is not None and (reader or not _is_default_norm(model_dir)):
        reader += eva.ln_vision(config.vit)
    if config.architecture == "blip2":
        reader += qformer.stage1_heads(config.qformer, config.projection_size)
    if reader:
        tables["blip2_pretrained.pth"] = reader
    if config.architecture == "minigpt4":
        tables["pretrained_minigpt4.pth"] = trained_table(config)
    elif config.vit is not None and config.language_model is not None:
        tables["blip2_pretrained.pth"] += trained_table(config)
    if not tables:
        raise UserError(f"{model_dir}: is a language model alone, which LAVIS does not save; use --format hf")
    return tables


def _is_default_norm(model_dir: Path) -> bool:
    scale, bias = read_leaf(model_dir, "ln_vision/scale"), read_leaf(model_dir, "ln_vision/bias")
    return bool((scale == 1).all() and (bias == 0).all())


def _state(table: Table, tensors: Tensors) -> dict[str, np.ndarray]:
    """All tensors of a file, tied ones as one array under two names."""
    state = {key: make() for key, (_, make) in tensors.items()}
    for alias in (entry for entry in table if isinstance(entry, Alias)):
        state[alias.source] = state[alias.of]
    return state


def save_torch(path: Path, state: Mapping[str, np.ndarray], *, wrapped: bool) -> None:
    """``torch.save`` beside ``path``, then rename: a file under the final name is always whole."""
    torch = import_torch(path)
    seen: dict[int, Any] = {}

    def tensor(values: np.ndarray) -> Any:
        if id(values) not in seen:
            owned = values if values.flags.writeable else values.copy()
            is_bfloat16 = owned.dtype == ml_dtypes.bfloat16
            made = torch.from_numpy(owned.view(np.int16) if is_bfloat16 else owned)
            seen[id(values)] = made.view(torch.bfloat16) if is_bfloat16 else made
        return seen[id(values)]

    tensors = {key: tensor(values) for key, values in state.items()}
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save({"model": tensors} if wrapped else tensors, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _export_hugging_face(
    model_dir: Path, manifest: ModelManifest, out: Path, overwrite: bool, progress: Progress | None
) -> list[Path]:
    table = hugging_face_table(model_dir, manifest.config)
    tensors = read_back(table, _merged(model_dir, manifest.config))
    with new_directory(out, marks=("config.json",), overwrite=overwrite) as partial:
        _write_json(partial / "config.json", export_config(manifest.config, dict(manifest.dtypes)))
        _save_shards(partial, tensors, manifest.dtypes, progress)
        _copy_tokenizers(model_dir, partial, manifest.config)
        names = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
    return [out / name for name in names]


def _merged(model_dir: Path, config: ModelConfig) -> Callable[[str, int | None], np.ndarray]:
    """Reads parameters with the adapters merged in: Hugging Face's classes have none."""
    read = merging(None if config.llama is None else config.llama.lora, functools.partial(read_leaf, model_dir))
    return lambda path, row: np.asarray(read(path, row))


def hugging_face_table(model_dir: Path, config: ModelConfig) -> Table:
    """The rules of the one Hugging Face class that holds this model."""
    if config.vit is None and config.language_model is not None:
        return language.table(config)
    if config.architecture == "encoder" or config.qformer is None:
        what = "picture side alone" if config.architecture == "encoder" else "MiniGPT-4 without a Q-Former"
        raise UserError(f"{model_dir}: a {what} has no class in Hugging Face; use --format lavis")
    table: list[Entry] = eva.hugging_face_vit(config.vit, source_grid=config.vit.grid_size)
    if config.architecture == "blip2":
        table += qformer.blip2_qformer(config.qformer)
        return table + qformer.stage1_heads(config.qformer, config.projection_size, hugging_face=True)
    instructed = config.qformer.with_text
    table += qformer.instructblip_qformer(config.qformer) if instructed else qformer.blip2_qformer(config.qformer)
    table += projection_table(config, "language_projection")
    return table + language.table(config, LANGUAGE)


def _save_shards(directory: Path, tensors: Tensors, dtypes: Mapping[str, str], progress: Progress | None) -> None:
    """``model.safetensors``, or several with an index, one in memory at a time."""
    from safetensors.numpy import save_file

    shards, sizes = _cut(tensors, dtypes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for done, (name, keys) in enumerate(zip(names, shards, strict=True)):
        arrays = {key: np.ascontiguousarray(tensors[key][1]()) for key in keys}
        save_file(arrays, directory / name, metadata={"format": "pt"})
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
        if progress is not None:
            progress(done + 1, len(shards))
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _cut(tensors: Tensors, dtypes: Mapping[str, str]) -> tuple[list[list[str]], list[int]]:
    """Keys of each shard, and bytes of each."""
    shards: list[list[str]] = [[]]
    sizes = [0]
    for key, (rule, _) in tensors.items():
        width = 4 if dtypes[rule.targets[0]] == "float32" else 2
        size = int(np.prod(rule.shape, dtype=np.int64)) * width
        if shards[-1] and sizes[-1] + size > _SHARD_BYTES:
            shards.append([])
            sizes.append(0)
        shards[-1].append(key)
        sizes[-1] += size
    return shards, sizes


def _copy_tokenizers(model_dir: Path, partial: Path, config: ModelConfig) -> None:
    """The language model's at the top; the Q-Former's in its folder, or at the top if it is the only one."""
    reader_home = partial if config.language_model is None else partial / "qformer_tokenizer"
    for source, target in ((model_dir / "tokenizer", partial), (model_dir / "qformer_tokenizer", reader_home)):
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
