"""Golden weights through the public converter, and gradients back through its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from cases import Case, file_named_by

from mgpt4_jax.checkpoint import flatten, load_params, read_manifest
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.convert.convert import convert, plan_conversion
from mgpt4_jax.convert.rules import Plan


@dataclass(frozen=True)
class Converted:
    """A case's weights as a model directory of ours."""

    case: Case
    model_dir: Path
    config: ModelConfig
    plan: Plan

    @cached_property
    def params(self) -> dict[str, Any]:
        return load_params(self.model_dir, jnp.float32)

    def to_source(self, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """A tree like the parameters (their gradient; parts may be absent) under the names of the source."""
        leaves = {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}
        found = {}
        for move in self.plan.moves:
            rule, row = move.rule, ... if move.row is None else move.row
            if all(target in leaves for target in rule.targets):
                found[move.key] = rule.transform.inverse([leaves[target][row] for target in rule.targets], rule.shape)
        return found


def convert_case(case: Case, out: Path, **replaced: Path) -> Converted:
    """``replaced`` names another file for a role (a copy in another format)."""
    roles = sources_of(case) | replaced
    overrides = overrides_of(case.config)
    tokenizer = {} if case.text_tokenizer is None else {"qformer_tokenizer": case.text_tokenizer}
    if case.language_tokenizer != case.language_model:
        tokenizer["tokenizer"] = case.language_tokenizer
    report = convert(**roles, out=out, overrides=overrides, **tokenizer)
    _, plan = plan_conversion(**roles, overrides=overrides)
    return Converted(case, out, report.config, plan)


def already_converted(case: Case, model_dir: Path) -> Converted:
    """What ``convert_case`` made in another process."""
    _, plan = plan_conversion(**sources_of(case), overrides=overrides_of(case.config))
    return Converted(case, model_dir, read_manifest(model_dir).config, plan)


def sources_of(case: Case) -> dict[str, Path]:
    """The converter's arguments: which file plays which role."""
    files = dict(case.weights)
    if "weights" in case.config:
        files["stage1"] = file_named_by(case, case.config["weights"])
    reader = files.get("stage1") or files.get("qformer") or files.get("ln_vision")
    roles = {
        "vit": files.get("vit"),
        "qformer": reader,
        "projection": files.get("projection"),
        "llm": case.language_model,
    }
    return {role: path for role, path in roles.items() if path is not None}


def overrides_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What ``config.json`` says and the weights cannot."""
    vit, reader = config.get("vit", {}), config.get("qformer", {})
    named = {
        "vit": {
            "num_heads": vit.get("num_heads"),
            "num_layers": vit.get("depth"),
            "image_size": config.get("image_size"),
            "layer_norm_eps": vit.get("block_ln_eps"),
            "output_norm_eps": vit.get("ln_vision_eps"),
        },
        "qformer": {
            "num_heads": reader.get("num_attention_heads"),
            "layer_norm_eps": reader.get("layer_norm_eps"),
        },
    }
    if "lora" in config:
        named["llama"] = {"lora": {"alpha": float(config["lora"]["alpha"])}}
    return {part: {key: value for key, value in fields.items() if value is not None} for part, fields in named.items()}
