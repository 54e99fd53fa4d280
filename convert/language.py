"""The language model of a conversion, whichever it is: LLaMA, OPT or T5."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from mgpt4_jax.config import Architecture, LlamaConfig, ModelConfig, OptConfig, T5Config
from mgpt4_jax.errors import UserError

from . import llama, opt, t5
from .hf_config import Values, llama_config, opt_config, t5_config
from .rules import Entry

LanguageConfig = LlamaConfig | OptConfig | T5Config
KINDS: Mapping[str, Architecture] = {"llama": "llama", "opt": "opt", "t5": "t5"}
"""``model_type`` in ``config.json``, also the field of ``ModelConfig`` -> the architecture without pictures."""

ARCHITECTURES: Mapping[str, Architecture] = {"llama": "minigpt4", "opt": "blip2_opt", "t5": "blip2_t5"}
INSTRUCTED: Mapping[str, Architecture] = {"llama": "instructblip", "t5": "blip2_t5"}
"""The architecture with pictures, and with a Q-Former that reads the instruction."""

NAMES = {"llama": "LLaMA", "opt": "OPT", "t5": "T5"}
PROJECTIONS = {"llama": ("llama_proj", "llm_proj"), "opt": ("opt_proj",), "t5": ("t5_proj",)}
"""What the originals call the projection into each; of LLaMA's the second is InstructBLIP's."""


def language_config(
    values: Values | None, path: Path, keys: Container[str], *, prefix: str = "", as_lavis: bool = False
) -> LanguageConfig:
    """From ``config.json`` or its ``text_config``; ``path`` is the directory, for messages.

    ``as_lavis``: the program of BLIP-2 uses it, which puts the exact GELU into FlanT5.
    """
    if values is None:
        raise UserError(f"{path}: has no config.json; --llm wants the Hugging Face directory of the language model")
    kind = values.get("model_type", "llama")
    if kind == "opt":
        return opt_config(values, path)
    if kind == "t5":
        return t5_config(values, path, has_head=f"{prefix}lm_head.weight" in keys, exact_gelu=as_lavis)
    if kind == "llama":
        return llama_config(values, path)
    raise UserError(f"{path}/config.json: model_type is {kind!r}; only {', '.join(KINDS)} are supported")


def kind_of(config: LanguageConfig) -> str:
    """One of ``KINDS``."""
    return {LlamaConfig: "llama", OptConfig: "opt", T5Config: "t5"}[type(config)]


def field_of(config: LanguageConfig | None) -> Mapping[str, Any]:
    """The argument of ``ModelConfig`` that holds ``config``."""
    return {} if config is None else {kind_of(config): config}


def table(config: ModelConfig, prefix: str = "", keys: Container[str] = ()) -> list[Entry]:
    """The language model's own tensors; ``keys`` are those of the file that is read, none for one to be written."""
    if config.opt is not None:
        return opt.opt(config.opt, prefix, keys)
    if config.t5 is not None:
        return t5.t5(config.t5, prefix, keys)
    return llama.llama(config.llama, prefix)
