"""What the stages differ in: the kind of model, its rows, and the objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn

from mgpt4_jax.checkpoint import ModelManifest
from mgpt4_jax.data.generative_rows import GenerativeRows, InstructRows
from mgpt4_jax.data.prompts import get_template
from mgpt4_jax.data.rows import PairBuilder, RowBuilder, Rows
from mgpt4_jax.errors import UserError
from mgpt4_jax.train.generative import prefix_objective
from mgpt4_jax.train.objectives import Objective, caption_objective
from mgpt4_jax.train.pretraining import pretraining_objective
from mgpt4_jax.train_config import TrainConfig


@dataclass(frozen=True)
class Stage:
    """One value of ``objective``.

    Args:
      architectures: the kinds of models that it trains.
      rows: how samples become sequences.
      objective: the loss of a module, given the rows.
      tells: whether the model can be asked for captions as it stands.
      needs_whole_batches: whether a row counts in the loss of others, so that a batch filled up with empty rows
        would be another loss.
    """

    architectures: tuple[str, ...]
    rows: Callable[[TrainConfig, ModelManifest], Rows]
    objective: Callable[[nn.Module, Rows], Objective]
    tells: bool = True
    needs_whole_batches: bool = False


def _language_rows(config: TrainConfig, manifest: ModelManifest) -> Rows:
    return RowBuilder(
        Path(config.model) / "tokenizer",
        config.text,
        get_template(config.text.template or manifest.template),
        manifest.config.tokens_per_image,
        "finetune" if config.objective == "finetune" else "align",
        config.data.clean_captions,
    )


def _pairs(config: TrainConfig, manifest: ModelManifest) -> Rows:
    return PairBuilder(Path(config.model) / "qformer_tokenizer", config.text, config.data.clean_captions)


def _pretraining(module: nn.Module, rows: Rows) -> Objective:
    assert isinstance(rows, PairBuilder)
    return pretraining_objective(module, dec_id=rows.tokenizer.dec_id, pad_id=rows.pad_id)


def _generative_rows(config: TrainConfig, manifest: ModelManifest) -> Rows:
    reader = manifest.config.qformer
    if reader.with_text:
        if config.text.max_prompt_length > reader.max_positions:
            raise UserError(
                f"text.max_prompt_length {config.text.max_prompt_length} is over the {reader.max_positions} positions "
                f"that the Q-Former of {config.model} has; lower it"
            )
        return InstructRows(
            Path(config.model) / "tokenizer",
            Path(config.model) / "qformer_tokenizer",
            config.text,
            manifest.config.tokens_per_image,
            manifest.config.t5 is not None,
            config.data.clean_captions,
        )
    return GenerativeRows(
        Path(config.model) / "tokenizer",
        config.text,
        manifest.config.tokens_per_image,
        manifest.config.t5 is not None,
        config.data.clean_captions,
    )


def _generative(module: nn.Module, rows: Rows) -> Objective:
    assert isinstance(rows, GenerativeRows | InstructRows)
    if rows.is_t5:
        return prefix_objective(module)
    return caption_objective(module, rows.text.max_text_length if isinstance(rows, InstructRows) else None)


def _captioning(module: nn.Module, rows: Rows) -> Objective:
    return caption_objective(module, rows.text.max_text_length)


_LANGUAGE = Stage(("minigpt4",), _language_rows, _captioning)

STAGES = {
    "language": Stage(("llama",), _language_rows, _captioning, tells=False),
    "align": _LANGUAGE,
    "finetune": _LANGUAGE,
    "generative": Stage(("blip2_opt", "blip2_t5", "instructblip"), _generative_rows, _generative, tells=False),
    "qformer_pretrain": Stage(("blip2",), _pairs, _pretraining, tells=False, needs_whole_batches=True),
}
