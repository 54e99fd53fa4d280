"""The golden cases, told from their files alone: no name, size, seed or vocabulary is built in.

A *case* is a directory with ``config.json``; what it recorded of an original program are its *quantities*:

* the arrays of ``outputs*.npz`` (``sim_i2t``; of several files ``rank0.loss``),
* the files of tensors ``grads*.safetensors`` and ``params*.safetensors``, one quantity each,
* the results among the entries of ``config.json`` (``config.chat_turns``, ``config.generate.greedy.text``)
  and those of ``captions.json`` (``captions.blip_caption``).

Any of them may be absent in another set; a quantity that no test claims is reported by ``unserved.py``.
"""

from __future__ import annotations

import fnmatch
import json
import os
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mgpt4_jax.convert.readers import open_source

_WEIGHTS = (".pth", ".pt", ".bin", ".safetensors")  # the first of them is taken where there are copies
_RECORDED_FILES = ("grads", "params")  # tensors that are results, not weights
_RESULTS = (
    "answer_ids",
    "bos",
    "chat_turns",
    "checkpoint_keys",
    "dec_token_id",
    "decay",
    "eos",
    "gen_context_segments_ids",
    "metrics",
    "multi_select_ranks",
    "no_decay",
    "pad_token_id",
    "param_groups",
    "prompt_segments_ids",
    "saved_checkpoint_model_keys",
    "stop_test",
    "temp",
    "trainable",
    "trainable_without_grad",
)
# What tells a weight file from another: one key.
_MARKERS = {
    "vit": "cls_token",
    "projection": "llama_proj.weight",
    "stage1": "vision_proj.weight",
    "qformer": "query_tokens",
    "ln_vision": "ln_vision.weight",
}


@dataclass(frozen=True)
class Case:
    """One directory; ``kind`` names the original program that it recorded."""

    directory: Path

    def __str__(self) -> str:
        return self.directory.name

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.directory / "config.json").read_text(encoding="utf-8"))

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        return _arrays(self.directory / "inputs.npz")

    @cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        """Arrays of all ``outputs*.npz``; those of ``outputs_rank0.npz`` are called ``rank0.*``."""
        found = {}
        for path in sorted(self.directory.glob("outputs*.npz")):
            prefix = path.stem.removeprefix("outputs").strip("_")
            found |= {f"{prefix}.{key}" if prefix else key: value for key, value in _arrays(path).items()}
        return found

    @cached_property
    def quantities(self) -> tuple[str, ...]:
        """Names of everything that was recorded."""
        files = [path.stem for path in self._files() if path.stem.startswith(_RECORDED_FILES)]
        results = [f"config.{key}" for key in _RESULTS if key in self.config]
        texts = [f"config.generate.{name}.text" for name in self.config.get("generate", {})]
        captions = [f"captions.{key}" for key in self.captions if key != "inputs"]
        return (*self.outputs, *files, *results, *texts, *captions)

    @cached_property
    def captions(self) -> dict[str, list[str]]:
        path = self.directory / "captions.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @cached_property
    def kind(self) -> str:
        for kind, is_kind in _KINDS.items():
            if is_kind(self):
                return kind
        return "unknown"

    @cached_property
    def weights(self) -> dict[str, Path]:
        """The file of each role (a key of ``_MARKERS``), the first where there are several."""
        return {role: paths[0] for role, paths in self.files_of_roles.items()}

    @cached_property
    def files_of_roles(self) -> dict[str, list[Path]]:
        """All weight files of each role: copies, and what a training run saved."""
        found: dict[str, list[Path]] = {}
        for path in self._files():
            if not path.stem.startswith(_RECORDED_FILES):
                tensors = open_source(path).tensors()
                role = next((role for role, key in _MARKERS.items() if key in tensors), None)
                if role is not None:
                    found.setdefault(role, []).append(path)
        return found

    @property
    def copies(self) -> list[Path]:
        """Weight files that have the name of another one before them, but for its ending."""
        files = self._files()
        return [path for index, path in enumerate(files) if path.stem in {other.stem for other in files[:index]}]

    @cached_property
    def language_model(self) -> Path | None:
        """The directory of a LLaMA, OPT or T5, whatever it is called; a tokeniser may say that it is one, too."""
        models = (path.parent for path in self._configs() if _model_type(path) in ("llama", "opt", "t5"))
        return next((folder for folder in models if any(_weights_in(folder))), None)

    @cached_property
    def language_tokenizer(self) -> Path | None:
        """The directory of the language model's tokeniser."""
        files = ("tokenizer.model", "merges.txt", "spiece.model", "tokenizer.json")
        folders = [self.language_model, *sorted(path for path in self.directory.iterdir() if path.is_dir())]
        found = (folder for folder in folders if folder is not None and any((folder / name).exists() for name in files))
        return next((folder for folder in found if folder != self.text_tokenizer), None)

    @cached_property
    def text_tokenizer(self) -> Path | None:
        """The directory of the Q-Former's word pieces."""
        return next((path.parent for path in sorted(self.directory.glob("*/vocab.txt"))), None)

    def tensors(self, quantity: str) -> dict[str, np.ndarray]:
        return load_file(self.directory / f"{quantity}.safetensors")

    def pixels(self, name: str = "image") -> np.ndarray:
        """[b H W 3] of an input that PyTorch keeps as [b 3 H W]."""
        return np.ascontiguousarray(self.inputs[name].transpose(0, 2, 3, 1))

    def _files(self) -> list[Path]:
        files = [path for path in self.directory.iterdir() if path.suffix in _WEIGHTS]
        return sorted(files, key=lambda path: (_WEIGHTS.index(path.suffix), path.name))

    def _configs(self) -> list[Path]:
        return sorted(self.directory.glob("*/config.json"))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def _weights_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in _WEIGHTS]


def _model_type(path: Path) -> str:
    return json.loads(path.read_text(encoding="utf-8")).get("model_type", "")


_KINDS = {
    "adamw_stage1": lambda case: "param_groups" in case.config,
    "adamw_minigpt4": lambda case: "betas" in case.config,
    "blip2_opt": lambda case: "opt" in case.config,
    "blip2_t5": lambda case: "t5" in case.config,
    "blip2_ranks": lambda case: "world_size" in case.config,
    "blip2_retrieval": lambda case: "k_test" in case.config,
    "blip2_stage1": lambda case: "sim_i2t" in case.outputs,
    "lr_schedule": lambda case: any(key.endswith("_epoch_step") for key in case.outputs),
    "minigptv2_lora": lambda case: "lora" in case.config,
    "minigptv2": lambda case: "conv_q" in case.config,
    "minigpt4": lambda case: "has_qformer" in case.config,
    "eva": lambda case: "pos_embed_used" in case.outputs,
    "qformer": lambda case: "image_only_last" in case.outputs,
    "preprocess": lambda case: any(key.startswith("resized_u8_") for key in case.outputs),
}


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case of ``MGPT4_GOLDEN`` or of ``tests/golden/data``."""
    root = Path(os.environ.get("MGPT4_GOLDEN") or Path(__file__).parent / "data")
    cases = tuple(Case(path.parent) for path in sorted(root.absolute().glob("*/config.json")))
    if not cases:
        raise pytest.UsageError(f"{root}: holds no golden case (no */config.json)")
    return cases


def recorded(kind: str, *patterns: str) -> list[Any]:
    """``parametrize`` over (case, quantity): whatever the cases of ``kind`` have of ``patterns``."""
    found = [(case, name) for case in all_cases() if case.kind == kind for name in case.quantities]
    return [pytest.param(case, name, id=f"{case}-{name}") for case, name in found if is_claimed(name, patterns)]


def is_claimed(quantity: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(quantity, pattern) for pattern in patterns)


def file_named_by(case: Case, relative: str) -> Path:
    """A file that ``config.json`` names, even where the directory beside this case has another name."""
    path = case.directory / relative
    if path.exists():
        return path
    found = sorted(case.directory.parent.glob(f"*/{path.name}"))
    return found[0] if found else path
