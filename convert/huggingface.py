"""Models from one ``Blip2*`` or ``InstructBlip*`` directory of Hugging Face."""

from __future__ import annotations

from mgpt4_jax.config import ModelConfig, QformerConfig, VitConfig
from mgpt4_jax.errors import UserError

from . import eva, language, llama, qformer
from .hf_config import Values, require
from .inferred import (
    Inferred,
    Overrides,
    apply_overrides,
    check_config,
    count_layers,
    grid_of,
    guess_template,
    qformer_config,
    resized_note,
    shape_of,
)
from .language import ARCHITECTURES, INSTRUCTED, field_of, kind_of, language_config
from .readers import Source
from .rules import Entry, Ignore, Part

LANGUAGE = "language_model."


def infer_hugging_face(source: Source, overrides: Overrides) -> Inferred:
    """A ``Blip2*`` or ``InstructBlip*`` directory of Hugging Face."""
    config, grid, instructed = hugging_face_parts(source, overrides)
    config = apply_overrides(config, overrides)
    check_config(config, str(source.path))
    table: list[Entry] = eva.hugging_face_vit(config.vit, source_grid=grid)
    reader = config.qformer
    table += qformer.instructblip_qformer(reader) if instructed else qformer.blip2_qformer(reader)
    if config.architecture == "blip2":
        table += qformer.stage1_heads(reader, config.projection_size, hugging_face=True)
        table.append(llama.constant("temp", 0.07, "Hugging Face drops the temperature: its initial value"))
    if (spoken := config.language_model) is not None:
        table += llama.projection("language_projection", reader.hidden_size, spoken.hidden_size)
        table += language.table(config, LANGUAGE, source.tensors())
    if config.architecture != "blip2":
        table.append(Ignore(r"(vision_projection|text_projection|itm_head)\..*", "a head that this model does not use"))
    part = Part(str(source.path), source.tensors(), table, source)
    resized = resized_note(grid, config.vit) if grid != config.vit.grid_size else None
    return Inferred(config, [part], guess_template(config), resized)


def hugging_face_parts(source: Source, overrides: Values) -> tuple[ModelConfig, int, bool]:
    """(configuration, grid of the position embeddings, whether the Q-Former is InstructBLIP's)."""
    values = source.config
    kind = (values or {}).get("model_type")
    if values is None or kind not in ("blip-2", "instructblip"):
        raise UserError(
            f"{source.path}/config.json: model_type {kind!r} is not one of blip-2, instructblip, llama, opt, t5; "
            "nothing here can read it"
        )
    instructed = kind == "instructblip"
    grid = grid_of(source, "vision_model.embeddings.position_embedding")
    vit = _vit_config(source, values.get("vision_config") or {}, grid)
    reader_values = values.get("qformer_config") or {}
    file = f"{source.path}/config.json: qformer_config"
    require(reader_values, file, "hidden_act", "gelu", "gelu")
    reader = qformer_config(
        source,
        "qformer.encoder.layer",
        "attention",
        "qformer.embeddings" if instructed else "embeddings",
        overrides,
        heads=reader_values.get("num_attention_heads", 12),
    )
    reader = QformerConfig(**{**vars(reader), "layer_norm_eps": reader_values.get("layer_norm_eps", 1e-12)})
    text_values = values.get("text_config") or {}
    keys = source.tensors()
    if "vision_projection.weight" in keys and reader.with_text and not instructed:
        size = shape_of(source, "vision_projection.weight", 2)[0]
        return ModelConfig("blip2", vit, reader, projection_size=size), grid, False
    if not any(key.startswith(LANGUAGE) for key in keys):
        return ModelConfig("encoder", vit, reader), grid, instructed
    text_values = {"model_type": "llama" if instructed else "opt", **text_values}  # what a file that is silent means
    spoken = language_config(text_values, source.path, keys, prefix=LANGUAGE)
    kinds = INSTRUCTED if instructed else ARCHITECTURES
    if (kind := kind_of(spoken)) not in kinds:
        raise UserError(f"{source.path}/config.json: an InstructBLIP on {kind} is not supported")
    return ModelConfig(kinds[kind], vit, reader, **field_of(spoken)), grid, instructed


def _vit_config(source: Source, values: Values, grid: int) -> VitConfig:
    file = f"{source.path}/config.json: vision_config"
    require(values, file, "hidden_act", "gelu", "gelu")
    require(values, file, "qkv_bias", True, True)
    d, _, size, _ = shape_of(source, "vision_model.embeddings.patch_embedding.weight", 4)
    eps = values.get("layer_norm_eps", 1e-6)
    return VitConfig(
        image_size=grid * size,
        patch_size=size,
        hidden_size=d,
        mlp_size=shape_of(source, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_layers=count_layers(source.tensors(), r"vision_model\.encoder\.layers\.(\d+)\."),
        num_heads=values.get("num_attention_heads", 16),
        layer_norm_eps=eps,
        output_norm_eps=eps,
    )
