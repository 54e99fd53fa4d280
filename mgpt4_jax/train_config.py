"""What a training run is: frozen dataclasses, filled from a YAML file and dotted options.

``TrainConfig`` is all of it; the published recipes are in ``configs/``. Every field is checked when a
configuration is made, so that a slip costs a second and not a night.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from mgpt4_jax.config import LoraConfig, check_fields
from mgpt4_jax.errors import UserError


@dataclass(frozen=True)
class SourceConfig:
    """One data set.

    Args:
      kind: ``webdataset`` (tars as img2dataset writes them), ``cc_sbu_align`` (a folder with ``filter_cap.json``
        and ``image/``), ``jsonl`` (lines with ``image`` and ``caption``, or ``instruction`` and ``answer``),
        ``lavis`` (an annotation list of LAVIS), ``array_record`` or ``tfds`` (the folder of a prepared data set).
      path: the folder or file; of tars a pattern such as ``laion/{00000..10488}.tar`` or ``laion/*.tar``.
      weight: how often a batch is taken from it, beside the other sources (MiniGPT-4's ``sample_ratio``).
      split: of a ``tfds`` data set.
      images: the folder that a ``lavis`` list names its pictures from; None: its own.
    """

    kind: Literal["webdataset", "cc_sbu_align", "jsonl", "lavis", "array_record", "tfds"]
    path: str
    weight: float = 1.0
    split: str = "train"
    images: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.weight > 0:
            raise UserError(f"source.weight of {self.path} must be above 0; leave the source out instead")


@dataclass(frozen=True)
class DataConfig:
    """Where the pairs come from.

    Args:
      train: sources; each batch is taken whole from one of them, by their weights.
      validation: sources that are only looked at; empty: no validation.
      transform: ``resize`` (MiniGPT-4 trains on the evaluation transform) or ``crop`` (LAVIS: random crop and flip).
      clean_captions: lower case and no punctuation, as BLIP-2's caption processor; not for instructions.
      num_workers: processes that read and decode; 0 does it in the trainer's threads.
      num_threads: threads that read and decode, in each process.
      prefetch: batches that wait ready.
      max_bad_share: training stops when more than this share of the samples cannot be read.
    """

    train: tuple[SourceConfig, ...]
    validation: tuple[SourceConfig, ...] = ()
    transform: Literal["resize", "crop"] = "resize"
    clean_captions: bool = False
    num_workers: int = 0
    num_threads: int = 4
    prefetch: int = 4
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self, allow_zero=("num_workers",))
        if not self.train:
            raise UserError("data.train names no source; give at least one, for example {kind: jsonl, path: my.jsonl}")
        if self.max_bad_share > 1:
            raise UserError(f"data.max_bad_share is a share from 0 to 1, got {self.max_bad_share}")


@dataclass(frozen=True)
class TextConfig:
    """How words become ids (MiniGPT-4 ``minigpt_base.py``).

    Args:
      max_text_length: the answer's tokens with the end symbol; a longer one loses its end.
      max_prompt_length: an instruction's tokens for an InstructBLIP, its Q-Former's and its language model's; a longer
        one loses its beginning.
      end_symbol: what an answer ends with: a line break in stage 1, ``###`` or ``</s>`` in stage 2.
      instructions: one is drawn for each batch; a sample's own instruction wins. Empty: the picture alone. For
        ``generative`` a sample's own goes into one with ``{}``, such as ``Question: {} Short answer:``.
        ``<Img><ImageHere></Img> `` is put in front where a text says not where the picture stands.
      template: the conversation template that wraps an instruction; None: the model's own.
      buckets: lengths that rows are padded to, the smallest that holds a batch. Empty: multiples of 32.
      max_length: longest row, prompt and picture and answer; a longer one counts as a bad sample.
    """

    max_text_length: int = 32
    max_prompt_length: int = 128
    end_symbol: str = "\n"
    instructions: tuple[str, ...] = ()
    template: str | None = None
    buckets: tuple[int, ...] = ()
    max_length: int = 512

    def __post_init__(self) -> None:
        check_fields(self)
        if any(bucket < 1 for bucket in self.buckets):
            raise UserError(f"text.buckets are lengths from 1, got {self.buckets}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate, counted in optimiser steps.

    Args:
      schedule: ``minigpt4`` (cosine over all steps, warm-up counted within an epoch), ``lavis`` (cosine over
        epochs, warm-up in the first one) or ``constant`` (after a warm-up).
      decay_rule: which parameters decay: ``minigpt4`` spares vectors and names with bias, ln or bn, ``lavis`` spares
        vectors and biases only.
      clip_norm: largest global norm of a gradient; 0: not clipped (as both originals).
      ema_decay: of a moving average of the trained parameters, which is then what is validated; 0: none.
    """

    peak_lr: float = 1e-4
    min_lr: float = 8e-5
    warmup_lr: float = 1e-6
    warmup_steps: int = 5000
    schedule: Literal["minigpt4", "lavis", "constant"] = "minigpt4"
    decay_rule: Literal["minigpt4", "lavis"] = "minigpt4"
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, allow_zero=("warmup_steps",))
        for name in ("beta1", "beta2", "ema_decay"):
            if getattr(self, name) >= 1:
                raise UserError(f"optim.{name} must be below 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and what is kept.

    Args:
      every: steps between two saves.
      keep_last: how many of the newest stay.
      keep_best: how many of the lowest validation loss stay besides.
    """

    every: int = 1000
    keep_last: int = 3
    keep_best: int = 1

    def __post_init__(self) -> None:
        check_fields(self, allow_zero=("keep_best",))


@dataclass(frozen=True)
class LogConfig:
    """What a person sees.

    Args:
      every: steps between two lines of ``log.jsonl``.
      validate_every: steps between two validations; 0: only at the end.
      validation_batches: most batches of one validation; 0: all.
      sample_every: steps between two sets of sample captions; 0: none.
      samples: pictures of the validation set (else of the first batch) that are captioned.
      tensorboard, wandb: write there too (the package must be installed).
      profile_step: trace three steps from this one on into ``RUN/profile``; 0: none.
      spike_factor: a loss over this many times the median of the last 100 stops training; 0: only NaN and Inf do.
    """

    every: int = 10
    validate_every: int = 1000
    validation_batches: int = 50
    sample_every: int = 1000
    samples: int = 4
    tensorboard: bool = False
    wandb: bool = False
    profile_step: int = 0
    spike_factor: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, allow_zero=("validate_every", "validation_batches", "sample_every", "profile_step"))


@dataclass(frozen=True)
class TrainConfig:
    """One run: a stage is an objective, what is trained, a data mixture and a schedule.

    Args:
      model: the model directory to start from, which is never changed.
      run: the directory of this run: checkpoints, log.jsonl, curves, the trained model. If it holds a run
        already, that one goes on.
      objective: ``language`` (words alone, all predicted: a language model from scratch), ``align`` (pictures alone
        before the caption, MiniGPT-4 stage 1), ``finetune`` (an instruction in the template before the answer, stage
        2), ``qformer_pretrain`` (contrast, matching and captioning, BLIP-2 stage 1) or ``generative`` (a prompt, if
        any, before the text: BLIP-2 stage 2 on OPT or T5, and InstructBLIP on Vicuna or T5, whose Q-Former reads the
        prompt, too).
      trainable: patterns of parameter paths, for example ``projection/*``, ``qformer/*``, ``ln_vision/*``,
        ``llama/*``; adapters are always trained when ``lora`` is given.
      epochs, steps_per_epoch: an epoch is a number of steps, as in the originals; their product is the whole run.
      batch_size: pairs of one step, over all devices and hosts.
      accumulation: parts that a batch is cut into, one after the other, to save memory.
      mesh: devices along each axis, for example ``data=2,fsdp=4``; None: all devices along ``data``.
      dtype: what is computed in, and what frozen parameters are kept in; auto: bfloat16, on a CPU float32.
      remat: compute activations again in the backward pass instead of keeping them.
    """

    model: str
    run: str
    data: DataConfig
    objective: Literal["language", "align", "finetune", "qformer_pretrain", "generative"] = "align"
    text: TextConfig = field(default_factory=TextConfig)
    trainable: tuple[str, ...] = ("projection/*",)
    lora: LoraConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: int = 4
    steps_per_epoch: int = 5000
    batch_size: int = 256
    accumulation: int = 1
    mesh: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: bool = False
    seed: int = 42
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_fields(self, allow_zero=("seed",))
        if self.batch_size % self.accumulation:
            raise UserError(f"batch_size {self.batch_size} cannot be cut into accumulation={self.accumulation} parts")
        if self.objective in ("language", "align", "qformer_pretrain") and self.text.instructions:
            raise UserError(f"objective {self.objective!r} asks nothing; for text.instructions use 'finetune'")
        if self.objective == "finetune" and not self.text.instructions:
            raise UserError("objective 'finetune' needs text.instructions, the questions that a batch draws from")
        if not self.trainable and self.lora is None:
            raise UserError("nothing is trained: name patterns in trainable, or give lora")

    @property
    def num_steps(self) -> int:
        return self.epochs * self.steps_per_epoch


def train_config_to_dict(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)
