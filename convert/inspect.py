"""What is this file? Its kind, tensors and dtypes, what it can be converted to, and what to beware of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from mgpt4_jax.checkpoint import flatten, read_manifest
from mgpt4_jax.models import abstract_params

from .inferred import PARTS, count_layers
from .language import KINDS, NAMES
from .lora import find_adapters
from .readers import FLOAT_DTYPES, Source, TensorInfo, open_source

_SHOWN = 24


@dataclass
class Inspection:
    """Printing it with rich draws a table; ``lines()`` is the same without the tensors."""

    path: Path
    kind: str  # "torch", "torch-legacy", "safetensors", "huggingface", "model"
    what: str  # in words
    tensors: dict[str, TensorInfo]
    size: int  # bytes of the weight files
    files: tuple[Path, ...]
    can_become: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def num_tensors(self) -> int:
        return len(self.tensors)

    @property
    def num_parameters(self) -> int:
        floats = (info for info in self.tensors.values() if info.dtype in FLOAT_DTYPES)
        return sum(int(np.prod(info.shape, dtype=np.int64)) for info in floats)

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of tensors of each dtype."""
        return dict(Counter(info.dtype for info in self.tensors.values()))

    def lines(self) -> list[str]:
        dtypes = ", ".join(f"{count} {name}" for name, count in self.dtypes.items())
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        return [
            f"{self.path}: {self.what}",
            f"{self.num_tensors} tensors, {self.num_parameters:,} parameters, {dtypes}; "
            f"{_bytes(self.size)} in {files} of kind {self.kind}",
            *(f"can become: {text}" for text in self.can_become),
            *(f"warning: {text}" for text in self.warnings),
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("tensor", "shape", "dtype")
        for key, info in list(self.tensors.items())[:_SHOWN]:
            name = escape(key if key.isprintable() else repr(key))  # a file may not steer the terminal
            table.add_row(name, "x".join(map(str, info.shape)) or "scalar", info.dtype)
        if self.num_tensors > _SHOWN:
            table.add_row(f"... and {self.num_tensors - _SHOWN} more", "", "")
        yield table
        yield from map(escape, self.lines())


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def inspect(path: str | Path) -> Inspection:
    """Look at a weight file, a Hugging Face directory or a model directory; reads no tensor.

    Raises ``UserError`` when it is none of these or damaged.
    """
    path = Path(path)
    if (path / "model.json").is_file():
        return _inspect_model(path)
    source = open_source(path)
    what, can_become, warnings = _describe(source)
    if source.kind == "torch-legacy":
        warnings.append("saved by a torch.save older than 1.6: PyTorch must read it whole into memory")
    if source.wrapper:
        warnings.append(f"a training run's checkpoint: {', '.join(source.wrapper)} beside the weights are not read")
    if odd := sorted({info.dtype for info in source.tensors().values()} - set(FLOAT_DTYPES) - {"int64"}):
        warnings.append(f"holds {', '.join(odd)}: quantised or double weights are not converted")
    size = sum(file.stat().st_size for file in source.files)
    return Inspection(path, source.kind, what, dict(source.tensors()), size, source.files, can_become, warnings)


def _inspect_model(path: Path) -> Inspection:
    manifest = read_manifest(path)
    shapes = flatten(abstract_params(manifest.config))
    tensors = {name: TensorInfo(shapes[name].shape, dtype, path) for name, dtype in manifest.dtypes.items()}
    parts = [name for name in PARTS if getattr(manifest.config, name) is not None]
    made = ", ".join(dict.fromkeys(source.name for source in manifest.sources)) or "nothing (initialised here)"
    what = f"a model directory: {manifest.config.architecture} ({', '.join(parts)}), made from {made}"
    if manifest.base is not None:
        count = sum(math.prod(tensors[name].shape) for name in manifest.trained)
        what += f"; {count:,} trained parameters are here, the others in its base {manifest.base.path}"
    files = tuple(sorted(file for file in (path / "params").rglob("*") if file.is_file()))
    size = sum(file.stat().st_size for file in files)
    formats = {"minigpt4": ["minigpt4", "lavis", "hf"], "encoder": ["lavis"], **{kind: ["hf"] for kind in KINDS}}
    names = formats.get(manifest.config.architecture, ["lavis", "hf"])
    if manifest.config.architecture == "minigpt4" and manifest.config.qformer is None:
        names = ["minigpt4", "lavis"]
    can_become = [f"`mgpt4 export {path} --format {name}`" for name in names]
    return Inspection(path, "model", what, tensors, size, files, can_become)


def _describe(source: Source) -> tuple[str, list[str], list[str]]:
    """(in words, what it can become, warnings)."""
    keys = source.tensors()
    if source.config is not None:
        return _describe_hugging_face(keys, source.path, source.config)
    sides = [words for words in (_vit(keys), _qformer(keys), *_projections(keys), _adapters(source)) if words]
    if not sides:
        return f"{source.kind} weights of an unknown model", [], ["nothing here can convert it"]
    can_become = []
    if set(keys) == {"ln_vision.weight", "ln_vision.bias"}:
        can_become.append(f"the norm of a picture side: `mgpt4 convert --vit FILE --qformer {source.path} ...`")
    elif _vit(keys):
        can_become.append(f"the picture side: `mgpt4 convert --vit {source.path} ...`")
    if "query_tokens" in keys:
        can_become.append(f"the Q-Former: `mgpt4 convert --qformer {source.path} ...`")
    if "vision_proj.weight" in keys:
        can_become.append(
            "BLIP-2 with its text side (embeddings, matching), give no --llm: `mgpt4 convert --vit FILE --qformer "
            f"{source.path} --qformer-tokenizer DIR ...`"
        )
    if "llama_proj.weight" in keys or "llm_proj.weight" in keys:
        can_become.append(f"the projection: `mgpt4 convert --llm DIR --projection {source.path} ...`")
    for name, llm in (("opt_proj", "OPT"), ("t5_proj", "FlanT5")):
        if f"{name}.weight" in keys and "query_tokens" in keys:
            command = f"mgpt4 convert --vit FILE --qformer {source.path} --llm {llm}_DIR ..."
            can_become.append(f"BLIP-2 on {llm}: `{command}`")
    return " + ".join(sides), can_become, []


def _vit(keys: Mapping[str, TensorInfo]) -> str:
    for prefix in ("", "visual_encoder."):
        if f"{prefix}cls_token" in keys:
            width = keys[f"{prefix}cls_token"].shape[-1]
            layers = count_layers(keys, prefix.replace(".", r"\.") + r"blocks\.(\d+)\.")
            return f"EVA-CLIP vision transformer ({layers} blocks of width {width})"
    return "ln_vision alone" if set(keys) == {"ln_vision.weight", "ln_vision.bias"} else ""


def _qformer(keys: Mapping[str, TensorInfo]) -> str:
    if "query_tokens" not in keys:
        return ""
    queries, width = keys["query_tokens"].shape[-2:]
    side = " with its text side" if "Qformer.bert.embeddings.word_embeddings.weight" in keys else ""
    heads = " and stage 1's heads" if "vision_proj.weight" in keys else ""
    return f"Q-Former ({queries} queries of width {width}){side}{heads}"


def _projections(keys: Mapping[str, TensorInfo]) -> list[str]:
    into = {"llama_proj": "LLaMA", "llm_proj": "Vicuna", "t5_proj": "FlanT5", "opt_proj": "OPT"}
    texts = []
    for name, language in into.items():
        if (info := keys.get(f"{name}.weight")) is not None and len(info.shape) == 2:
            texts.append(f"projection into {language} ({info.shape[1]} -> {info.shape[0]})")
    return texts


def _adapters(source: Source) -> str:
    found = find_adapters(source)
    return "" if found is None else f"LoRA adapters of rank {found.config.rank} on {', '.join(found.config.targets)}"


def _describe_hugging_face(
    keys: Mapping[str, TensorInfo], path: Path, config: Mapping[str, Any]
) -> tuple[str, list[str], list[str]]:
    kind = config.get("model_type")
    if kind in KINDS:
        return _describe_language_model(kind, path, config)
    if kind in ("blip-2", "instructblip"):
        language = (config.get("text_config") or {}).get("model_type", "llama" if kind == "instructblip" else "opt")
        has_language = any(key.startswith("language_model.") for key in keys)
        what = f"Hugging Face {kind}" + (f" with {language}" if has_language else " without a language model")
        if has_language and language not in KINDS:
            return what, [], [f"its language model ({language}) is not supported"]
        return what, [f"a model: `mgpt4 convert --from {path} ...`"], []
    if kind == "bert" and "cls.predictions.bias" in keys:
        command = f"mgpt4 convert --vit FILE --bert {path} ..."
        return "Hugging Face BERT with its prediction head", [f"where stage 1 of BLIP-2 begins: `{command}`"], []
    return f"Hugging Face {kind}", [], [f"model_type {kind!r} is not converted"]


def _describe_language_model(kind: str, path: Path, config: Mapping[str, Any]) -> tuple[str, list[str], list[str]]:
    width, count = ("d_model", "num_layers") if kind == "t5" else ("hidden_size", "num_hidden_layers")
    size = f"{config.get(count, '?')} layers of width {config.get(width, '?')}"
    warnings = []
    if kind == "llama" and config.get("max_position_embeddings") == 4096 and config.get("rms_norm_eps") == 1e-5:
        warnings.append("looks like LLaMA-2: not for a projection that was trained with Vicuna v0")
    return f"Hugging Face {NAMES[kind]} ({size})", [f"the language model: `mgpt4 convert --llm {path} ...`"], warnings
