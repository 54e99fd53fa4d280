"""Models from the files of LAVIS and MiniGPT-4: each holds some sides of the model, none holds all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from mgpt4_jax.config import LlamaConfig, ModelConfig, QformerConfig, VitConfig
from mgpt4_jax.errors import UserError

from . import eva, language, llama, lora, qformer
from .inferred import (
    Inferred,
    Overrides,
    apply_overrides,
    check_config,
    count_layers,
    grid_of,
    guess_template,
    heads_of,
    qformer_config,
    resized_note,
    shape_of,
)
from .language import ARCHITECTURES, INSTRUCTED, KINDS, NAMES, PROJECTIONS, LanguageConfig, field_of, language_config
from .readers import Source
from .rules import Entry, Ignore, Part

_VIT_HEADS = {1408: 16}
_EVA_LAYERS = 39  # of 40: BLIP-2 takes the output of the last but one

# Which side of a LAVIS model a file holds: told by one key.
_MARKERS = {
    "vit": ("visual_encoder.cls_token", "cls_token"),
    "ln_vision": ("ln_vision.weight",),
    "qformer": ("query_tokens",),
    "heads": ("vision_proj.weight", "text_proj.weight", "itm_head.weight"),
}
# What wins when two files hold a side: a trained checkpoint, then the file that the option names.
_PRECEDENCE = {"vit": ("projection", "vit", "qformer")}
_DEFAULT_PRECEDENCE = ("projection", "qformer", "vit")


class LavisFiles:
    """The parts as LAVIS and MiniGPT-4 keep them: separate files, of which any may be absent."""

    def __init__(self, sources: Mapping[str, Source], overrides: Overrides, allow_llm_mismatch: bool, seed: int = 0):
        self.sources, self.overrides, self.allow_llm_mismatch, self.seed = sources, overrides, allow_llm_mismatch, seed
        files = {role: source for role, source in sources.items() if role != "llm"}
        llm = sources.get("llm")
        self.kind = "llama" if llm is None else (llm.config or {}).get("model_type", "llama")
        self.projections = PROJECTIONS.get(self.kind, ())
        markers = _MARKERS | {"projection": tuple(f"{name}.weight" for name in self.projections)}
        self.owner = {side: _owner(side, keys, files) for side, keys in markers.items()}
        adapters = {role: lora.find_adapters(files[role]) for role in _DEFAULT_PRECEDENCE if role in files}
        self.owner["lora"] = next((role for role, found in adapters.items() if found is not None), None)
        self.adapters = adapters.get(self.owner["lora"])

    def infer(self) -> Inferred:
        config, vit_parts = self._config()
        grid, layers = vit_parts
        parts = []
        for role, source in self.sources.items():
            if role == "llm":
                table = language.table(config, keys=source.tensors())
            else:
                table = self._table(role, source, config, grid, layers)
            parts.append(Part(str(source.path), source.tensors(), table, source))
        parts[0] = Part(parts[0].name, parts[0].tensors, [*parts[0].table, *self._fills(config)], parts[0].source)
        resized = None
        if config.vit is not None and grid != config.vit.grid_size:
            resized = resized_note(grid, config.vit)
        warning = lora.assumed_alpha(self.overrides) if self.adapters is not None else None
        return Inferred(config, parts, guess_template(config), resized, [] if warning is None else [warning])

    def _source(self, side: str) -> Source | None:
        role = self.owner[side]
        return None if role is None else self.sources[role]

    def _config(self) -> tuple[ModelConfig, tuple[int, int]]:
        llm = self.sources.get("llm")
        spoken = None
        if llm is not None:
            has_picture = self.owner["vit"] is not None
            spoken = language_config(llm.config, llm.path, llm.tensors(), as_lavis=has_picture)
        if isinstance(spoken, LlamaConfig) and self.adapters is not None:
            spoken = dataclasses.replace(spoken, lora=self.adapters.config)
        vit, grid, layers = None, 0, 0
        if (source := self._source("vit")) is not None:
            vit, grid, layers = lavis_vit_config(source, self.overrides)
        reader = None
        if (source := self._source("qformer")) is not None:
            reader = lavis_qformer_config(source, self.overrides)
        self._check_files(vit is not None, llm is not None)
        instructed = reader is not None and reader.with_text and self._is_instructed()
        if llm is not None and vit is None:
            config = ModelConfig(KINDS[self.kind], **field_of(spoken))
        elif llm is not None:
            reader = self._reader_for_llm(vit, reader, spoken, instructed)
            kinds = INSTRUCTED if instructed else ARCHITECTURES
            config = ModelConfig(kinds[self.kind], vit, reader, **field_of(spoken))
        elif (heads := self._source("heads")) is not None and reader is not None and reader.with_text:
            size = shape_of(heads, "vision_proj.weight", 2)[0]
            config = ModelConfig("blip2", vit, reader, projection_size=size)
        else:
            config = ModelConfig("encoder", vit, reader)
        config = apply_overrides(config, self.overrides)
        check_config(config, self._names())
        return config, (grid, layers)

    def _is_instructed(self) -> bool:
        """Whether the projection was trained with a Q-Former that reads the instruction, if that is here.

        InstructBLIP calls that into Vicuna ``llm_proj``; that into FlanT5 has BLIP-2's name, but BLIP-2 saves no text
        side beside it.
        """
        file = self._source("projection")
        if file is None or self.kind not in INSTRUCTED:
            return False
        is_own_reader = self.owner["projection"] == self.owner["qformer"]
        return is_own_reader if self.kind == "t5" else "llm_proj.weight" in file.tensors()

    def _names(self) -> str:
        return ", ".join(str(source.path) for source in self.sources.values())

    def _check_files(self, has_vit: bool, has_llm: bool) -> None:
        """Files that make no model together, with the option that is missing or too much."""
        if (file := self.sources.get("vit")) is not None and self.owner["vit"] is None:
            raise UserError(f"{file.path}: holds no vision transformer (no cls_token); --vit wants eva_vit_g.pth")
        if (file := self.sources.get("qformer")) is not None and not (self.owner["qformer"] or self.owner["ln_vision"]):
            raise UserError(f"{file.path}: holds no Q-Former (no query_tokens); --qformer wants blip2_pretrained*.pth")
        if (file := self.sources.get("projection")) is not None and self.owner["projection"] is None:
            wanted = " or ".join(self.projections)
            raise UserError(f"{file.path}: holds no {wanted}; --projection wants what was trained with this --llm")
        if self.owner["projection"] is not None and not has_llm:
            raise UserError(f"{self._source('projection').path}: holds a projection; add --llm, what it projects into")
        if self.owner["lora"] is not None and not has_llm:
            raise UserError(f"{self._source('lora').path}: holds LoRA adapters; add --llm, what they adapt")
        if self.owner["lora"] is not None and self.kind != "llama":
            raise UserError(f"{self._source('lora').path}: holds LoRA adapters of a LLaMA; --llm is {self.kind}")
        sides = ("ln_vision", "heads", "projection", *(("qformer",) if has_llm else ()))
        role = next((self.owner[side] for side in sides if self.owner[side] is not None), None)
        if not has_vit and role is not None:
            raise UserError(f"{self.sources[role].path}: comes without its vision transformer; add --vit eva_vit_g.pth")

    def _reader_for_llm(
        self, vit: VitConfig, reader: QformerConfig | None, llm: LanguageConfig, instructed: bool
    ) -> QformerConfig | None:
        """The Q-Former that the projection wants (or none), checked against the language model."""
        if reader is not None and not instructed:
            reader = _without_text(reader)
        if reader is None and self.kind != "llama":
            raise UserError(f"{self.sources['llm'].path}: BLIP-2 reads pictures with a Q-Former; add --qformer")
        file = self._source("projection")
        if file is None:
            return reader
        name = next(name for name in self.projections if f"{name}.weight" in file.tensors())
        outputs, inputs = shape_of(file, f"{name}.weight", 2)
        if outputs != llm.hidden_size:
            size = llm.hidden_size
            raise UserError(
                f"{file.path}: projects to width {outputs}, but the language model "
                f"{self.sources['llm'].path} has width {size}; give the one that it was trained with"
            )
        joined = 4 * vit.hidden_size
        if reader is None and inputs == joined:
            return None
        if reader is None:
            raise UserError(f"{file.path}: projects from width {inputs}, that of a Q-Former; add --qformer")
        if inputs == reader.hidden_size:
            self._check_vicuna(llm, file)
            return reader
        if inputs == joined and "qformer" not in self.sources:
            return None
        if inputs == joined:
            raise UserError(
                f"{file.path}: projects four joined patches ({inputs}), without a Q-Former; leave --qformer out"
            )
        raise UserError(
            f"{file.path}: projects from width {inputs}; the Q-Former has {reader.hidden_size}, "
            f"four joined patches {joined}: it belongs to another model"
        )

    def _check_vicuna(self, llm: LanguageConfig, projection: Source) -> None:
        if not isinstance(llm, LlamaConfig):
            return
        looks_like_llama2 = llm.rms_norm_eps == 1e-5 and llm.max_positions == 4096
        if looks_like_llama2 and not self.allow_llm_mismatch and projection.path != self.sources["llm"].path:
            raise UserError(
                f"{self.sources['llm'].path}: looks like LLaMA-2 (rms_norm_eps 1e-5, 4096 positions), but "
                f"{projection.path} reads a Q-Former and was trained with Vicuna v0 (LLaMA-1); same width, other "
                "weights: the answers would be noise. Give Vicuna v0, or --allow-llm-mismatch if you trained it so"
            )

    def _table(self, role: str, source: Source, config: ModelConfig, grid: int, layers: int) -> list[Entry]:
        others = [kind for kind in KINDS if kind != self.kind]
        projections = "|".join(name for kind in others for name in PROJECTIONS[kind])
        into = " or ".join(NAMES[kind] for kind in others)
        table: list[Entry] = [
            Ignore(rf"({projections})\..*", f"projects into {into}, not into this language model"),
            Ignore(r"llama_model\..*\.rotary_emb\.inv_freq", "a buffer: rotary frequencies are computed"),
        ]
        prefix = "visual_encoder." if "visual_encoder.cls_token" in source.tensors() else ""
        if self.owner["vit"] == role:
            table += eva.lavis_vit(config.vit, prefix=prefix, source_grid=grid, source_layers=layers)
        else:
            pattern = r"visual_encoder\..*|cls_token|pos_embed|(patch_embed|blocks|norm|fc_norm|head)\..*"
            table.append(Ignore(pattern, self._elsewhere("vit", "the vision transformer")))
        if self._reads_ln_vision(role, config):
            table += eva.ln_vision(config.vit)
        else:
            table.append(Ignore(r"ln_vision\..*", self._elsewhere("ln_vision", "ln_vision", config.qformer is None)))
        if self.owner["qformer"] == role and config.qformer is not None:
            table += qformer.lavis_qformer(config.qformer)
        else:
            reason = self._elsewhere("qformer", "the Q-Former", config.qformer is None)
            table.append(Ignore(r"query_tokens|Qformer\.(?!bert\.embeddings\.position_ids).*", reason))
            table.append(Ignore(r"Qformer\.bert\.embeddings\.position_ids", qformer.BUFFER))
        if config.architecture == "blip2" and self.owner["heads"] == role:
            table += qformer.stage1_heads(config.qformer, config.projection_size)
        else:
            reason = "the contrastive and matching heads of stage 1: not part of this model"
            if config.architecture == "blip2":
                reason = self._elsewhere("heads", "the set of stage 1's heads")
            table.append(Ignore(r"(vision_proj|text_proj|itm_head)\..*|temp", reason))
        for name in self.projections:
            if self.owner["projection"] == role and f"{name}.weight" in source.tensors():
                width = config.language_model.hidden_size
                table += llama.projection(name, source.tensors()[f"{name}.weight"].shape[1], width)
            else:
                table.append(Ignore(rf"{name}\..*", self._elsewhere("projection", "the projection")))
        if self.owner["lora"] == role:
            table += lora.lora(config.llama, self.adapters.root, self.adapters.infix)
        else:
            table.append(Ignore(r".*\.lora_[AB]\..*", self._elsewhere("lora", "the set of LoRA adapters")))
        return table

    def _reads_ln_vision(self, role: str, config: ModelConfig) -> bool:
        """MiniGPT-4 without a Q-Former never loads ``ln_vision``, unless training has saved it."""
        if self.owner["ln_vision"] != role:
            return False
        return role == "projection" or config.qformer is not None or config.llama is None

    def _elsewhere(self, side: str, words: str, absent: bool = False) -> str:
        if absent or self.owner[side] is None:
            return f"{words}: not part of this model"
        path = self._source(side).path
        given_twice = sum(source.path == path for source in self.sources.values()) > 1
        return f"{words} is taken from {path.name}" + f", given as --{self.owner[side]}" * given_twice

    def _fills(self, config: ModelConfig) -> list[Entry]:
        fills: list[Entry] = []
        if config.vit is not None and not any(self._reads_ln_vision(role, config) for role in self.sources):
            reason = "no file holds it for this model: weight 1 and bias 0, as in the original"
            fills += [llama.constant("ln_vision/scale", 1.0, reason), llama.constant("ln_vision/bias", 0.0, reason)]
        has_both_sides = config.vit is not None and config.language_model is not None
        if has_both_sides and self.owner["projection"] is None:
            fills += llama.untrained_projection(self.seed)
        return fills


def _owner(side: str, markers: tuple[str, ...], files: Mapping[str, Source]) -> str | None:
    for role in _PRECEDENCE.get(side, _DEFAULT_PRECEDENCE):
        if role in files and any(marker in files[role].tensors() for marker in markers):
            return role
    return None


def lavis_vit_config(source: Source, overrides: Overrides) -> tuple[VitConfig, int, int]:
    """(configuration, grid of the file's position embeddings, blocks in the file)."""
    keys = source.tensors()
    prefix = "visual_encoder." if "visual_encoder.cls_token" in keys else ""
    layers = count_layers(keys, re.escape(prefix) + r"blocks\.(\d+)\.")
    d, _, size, _ = shape_of(source, f"{prefix}patch_embed.proj.weight", 4)
    grid = grid_of(source, f"{prefix}pos_embed")
    if d in _VIT_HEADS:
        used = min(layers, _EVA_LAYERS)
    else:  # the whole EVA is told by its final norm, which comes after the block that is not used
        used = layers - 1 if not prefix and "norm.weight" in keys else layers
    config = VitConfig(
        image_size=grid * size,
        patch_size=size,
        hidden_size=d,
        mlp_size=shape_of(source, f"{prefix}blocks.0.mlp.fc1.weight", 2)[0],
        num_layers=used,
        num_heads=heads_of("vit", d, _VIT_HEADS, overrides, source),
    )
    return config, grid, layers


def lavis_qformer_config(source: Source, overrides: Overrides) -> QformerConfig:
    return qformer_config(source, "Qformer.bert.encoder.layer", "self", "Qformer.bert.embeddings", overrides)


def _without_text(config: QformerConfig) -> QformerConfig:
    plain = QformerConfig()
    return dataclasses.replace(
        config,
        with_text=False,
        with_lm_head=False,
        vocab_size=plain.vocab_size,
        max_positions=plain.max_positions,
    )
