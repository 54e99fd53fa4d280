"""Model configurations: frozen dataclasses and the presets of the published models.

A ``ModelConfig`` names the parts that a model has; a part that is ``None`` is absent.
It is stored as JSON in ``model.json`` and read back by ``model_config_from_dict``.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from mgpt4_jax.errors import UserError

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1000


def check_fields(config: Any, *, allow_zero: tuple[str, ...] = ()) -> None:
    """Types and ranges, however a configuration is made: files of others say what they like.

    Whole numbers count from 1, but for the fields in ``allow_zero``.
    """
    part = type(config).__name__.removesuffix("Config").lower()
    for name, hint in typing.get_type_hints(type(config)).items():
        value, most = getattr(config, name), MAX_LAYERS if name == "num_layers" else MAX_SIZE
        if name in allow_zero and type(value) is int and value == 0:
            continue
        if problem := _problem(value, hint, most):
            raise UserError(f"{part}.{name} must be {problem}, got {repr(value)[:60]}")


def _problem(value: Any, hint: Any, most: int) -> str | None:
    """What ``value`` should be and is not; nested configurations check themselves."""
    if hint is int and not (type(value) is int and 1 <= value <= most):
        return f"a whole number from 1 to {most}"
    if hint is float and not (type(value) in (int, float) and math.isfinite(value) and value >= 0):
        return "a number from 0"
    if hint is bool and type(value) is not bool:
        return "true or false"
    if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
        return f"one of {', '.join(typing.get_args(hint))}"
    return None


IGNORED = -100
"""Target of a position that takes no part in a loss (PyTorch's ``ignore_index``)."""


@dataclass(frozen=True)
class VitConfig:
    """EVA-CLIP vision transformer, without the final norm (LAVIS ``eva_vit.py``)."""

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1408
    mlp_size: int = 6144
    num_layers: int = 39
    num_heads: int = 16
    layer_norm_eps: float = 1e-6
    output_norm_eps: float = 1e-5  # `ln_vision`, applied after the tower; 1e-6 in Hugging Face files
    remat: bool = False

    __post_init__ = check_fields

    @property
    def grid_size(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Patches and the class token."""
        return self.grid_size**2 + 1


@dataclass(frozen=True)
class QformerConfig:
    """BERT with learned queries and cross-attention (LAVIS ``Qformer.py``).

    ``with_text`` keeps word and position embeddings and the text feed-forward of each layer;
    ``with_lm_head`` keeps the tied language-model head (stage 1, captioning).
    """

    hidden_size: int = 768
    mlp_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    num_queries: int = 32
    encoder_size: int = 1408
    cross_attention_frequency: int = 2
    layer_norm_eps: float = 1e-12
    with_text: bool = False
    with_lm_head: bool = False
    vocab_size: int = 30523
    max_positions: int = 512
    dropout: float = 0.1
    remat: bool = False

    __post_init__ = check_fields


@dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling: ``linear`` divides positions; ``llama3`` slows the long wave lengths only."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    __post_init__ = check_fields


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on matrices of the language model: ``W + alpha / rank * B A`` (Hu et al. 2021).

    Args:
      targets: names of matrices of a layer: query, key, value, out, gate, up, down.
    """

    rank: int = 64
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")
    dropout: float = 0.05

    def __post_init__(self) -> None:
        check_fields(self)
        known = ("query", "key", "value", "out", "gate", "up", "down")
        if unknown := [name for name in self.targets if name not in known]:
            raise UserError(f"lora.targets: unknown matrix {unknown[0]!r}; known: {', '.join(known)}")
        if not self.targets or self.dropout >= 1:
            raise UserError("lora needs at least one target, and a dropout below 1")


@dataclass(frozen=True)
class LlamaConfig:
    """LLaMA decoder (Hugging Face ``LlamaForCausalLM``)."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    mlp_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    max_positions: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    remat: bool = False
    lora: LoraConfig | None = None

    __post_init__ = check_fields


@dataclass(frozen=True)
class OptConfig:
    """OPT decoder (Hugging Face ``OPTForCausalLM``): learned positions, ReLU, its head tied to the embedding.

    ``embed_size`` is the width of the embedding where it is projected to ``hidden_size`` (350m only).
    ``norm_first`` is False for 350m alone: norms then stand after each block, and none at the end.
    """

    vocab_size: int = 50272
    hidden_size: int = 2560
    mlp_size: int = 10240
    num_layers: int = 32
    num_heads: int = 32
    embed_size: int = 2560
    max_positions: int = 2048
    norm_first: bool = True
    layer_norm_eps: float = 1e-5
    remat: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hidden_size % self.num_heads:
            raise UserError(f"opt.num_heads={self.num_heads} does not divide opt.hidden_size={self.hidden_size}")


@dataclass(frozen=True)
class T5Config:
    """T5 encoder and decoder (Hugging Face ``T5ForConditionalGeneration``): T5, T5 v1.1 and FlanT5.

    ``gated`` feed-forward multiplies ``activation(gate)`` by a second projection; "gelu" is the exact one, which
    LAVIS puts in the place of FlanT5's own "gelu_new" (the tanh approximation).
    ``tie_embeddings``: the head is the embedding; ``scale_logits``: its input is scaled by ``hidden_size ** -0.5``,
    as T5's is and that of v1.1 and FlanT5 is not.
    """

    vocab_size: int = 32128
    hidden_size: int = 2048
    mlp_size: int = 5120
    num_layers: int = 24
    num_decoder_layers: int = 24
    num_heads: int = 32
    head_dim: int = 64
    num_buckets: int = 32
    max_distance: int = 128
    layer_norm_eps: float = 1e-6
    gated: bool = True
    activation: Literal["relu", "gelu", "gelu_new"] = "gelu_new"
    tie_embeddings: bool = False
    scale_logits: bool = False
    start_id: int = 0  # what the decoder begins with
    remat: bool = False

    def __post_init__(self) -> None:
        check_fields(self, allow_zero=("start_id",))
        if self.num_decoder_layers > MAX_LAYERS:
            raise UserError(f"t5.num_decoder_layers must be at most {MAX_LAYERS}, got {self.num_decoder_layers}")
        if self.num_buckets < 4 or self.num_buckets % 4 or self.max_distance <= self.num_buckets // 2:
            raise UserError(
                f"t5.num_buckets={self.num_buckets} must be a multiple of 4, and t5.max_distance={self.max_distance} "
                "more than half of it"
            )


Architecture = Literal["minigpt4", "instructblip", "blip2", "blip2_opt", "blip2_t5", "encoder", "llama", "opt", "t5"]


@dataclass(frozen=True)
class ModelConfig:
    """Which parts a model has.

    * ``minigpt4``: vit, qformer (or none: ``patches_per_token`` neighbouring patches are joined),
      projection, llama
    * ``instructblip``: the same with a Q-Former that reads the instruction (``with_text``)
    * ``blip2``: vit and a Q-Former with its text side and the contrastive and matching heads
    * ``blip2_opt``: vit, qformer, projection, opt
    * ``blip2_t5``: vit, qformer, projection, t5; InstructBLIP on FlanT5 if the Q-Former reads text
    * ``encoder``: the picture side alone: vit, qformer, or both
    * ``llama``, ``opt``, ``t5``: the language model alone
    """

    architecture: Architecture
    vit: VitConfig | None = None
    qformer: QformerConfig | None = None
    llama: LlamaConfig | None = None
    patches_per_token: int = 4
    projection_size: int = 256  # width of the contrastive space of `blip2`
    opt: OptConfig | None = None
    t5: T5Config | None = None

    __post_init__ = check_fields

    @property
    def language_model(self) -> LlamaConfig | OptConfig | T5Config | None:
        return self.llama or self.opt or self.t5

    @property
    def image_size(self) -> int:
        """Side of a picture in pixels; 0 of a model that reads none."""
        return 0 if self.vit is None else self.vit.image_size

    @property
    def tokens_per_image(self) -> int:
        """How many positions one picture takes in the language model's input."""
        if self.vit is None:
            return 0
        if self.qformer is not None:
            return self.qformer.num_queries
        return (self.vit.num_positions - 1) // self.patches_per_token


def eva_vit_g(image_size: int = 224) -> VitConfig:
    """EVA-CLIP ViT-g/14 as BLIP-2 uses it: 39 of its 40 blocks. 986 M parameters."""
    return VitConfig(image_size=image_size)


def qformer_base(*, with_text: bool = False, with_lm_head: bool = False) -> QformerConfig:
    """The BERT-base Q-Former of BLIP-2: 32 queries, 105.1 M parameters without its text side."""
    return QformerConfig(with_text=with_text, with_lm_head=with_lm_head)


def _llama(width: int, mlp: int, layers: int, heads: int, **fields: Any) -> LlamaConfig:
    """A published shape, of which ``fields`` may change anything."""
    shape = {"hidden_size": width, "mlp_size": mlp, "num_layers": layers, "num_heads": heads}
    return LlamaConfig(**shape | {"num_kv_heads": heads, "head_dim": width // heads} | fields)


def llama_7b(**fields: Any) -> LlamaConfig:
    return _llama(4096, 11008, 32, 32, **fields)


def llama_13b(**fields: Any) -> LlamaConfig:
    return _llama(5120, 13824, 40, 40, **fields)


def llama_33b(**fields: Any) -> LlamaConfig:
    return _llama(6656, 17920, 60, 52, **fields)


def llama_65b(**fields: Any) -> LlamaConfig:
    return _llama(8192, 22016, 80, 64, **fields)


def vicuna_7b() -> LlamaConfig:
    """Vicuna v0: LLaMA-1 and one more row, the pad token that its authors added."""
    return llama_7b(vocab_size=32001)


def vicuna_13b() -> LlamaConfig:
    return llama_13b(vocab_size=32001)


def llama2_7b() -> LlamaConfig:
    return llama_7b(rms_norm_eps=1e-5, max_positions=4096)


def llama2_70b() -> LlamaConfig:
    return _llama(8192, 28672, 80, 64, num_kv_heads=8, rms_norm_eps=1e-5, max_positions=4096)


def llama31_8b() -> LlamaConfig:
    """LLaMA-3.1: grouped heads and scaled rotary embeddings."""
    return _llama(
        4096,
        14336,
        32,
        32,
        num_kv_heads=8,
        vocab_size=128256,
        rms_norm_eps=1e-5,
        max_positions=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    )


def opt_2_7b() -> OptConfig:
    return OptConfig()


def opt_6_7b() -> OptConfig:
    return OptConfig(hidden_size=4096, mlp_size=16384, embed_size=4096)


def flan_t5_xl() -> T5Config:
    return T5Config()


def flan_t5_xxl() -> T5Config:
    return T5Config(hidden_size=4096, mlp_size=10240, num_heads=64)


def minigpt4(llama: LlamaConfig, *, with_qformer: bool = True, image_size: int = 224) -> ModelConfig:
    """MiniGPT-4 on Vicuna (with the Q-Former) or on LLaMA-2 (without it)."""
    return ModelConfig("minigpt4", eva_vit_g(image_size), qformer_base() if with_qformer else None, llama)


def blip2_stage1(image_size: int = 224) -> ModelConfig:
    """The Q-Former with its text side and all three heads, as ``blip2_pretrained.pth`` holds it."""
    return ModelConfig("blip2", eva_vit_g(image_size), qformer_base(with_text=True, with_lm_head=True))


def blip2_stage2(
    language_model: OptConfig | T5Config, *, reads_instruction: bool = False, image_size: int = 224
) -> ModelConfig:
    """BLIP-2 on OPT or FlanT5; ``reads_instruction``: InstructBLIP's Q-Former, on FlanT5."""
    parts = (eva_vit_g(image_size), qformer_base(with_text=reads_instruction))
    if isinstance(language_model, OptConfig):
        return ModelConfig("blip2_opt", *parts, opt=language_model)
    return ModelConfig("blip2_t5", *parts, t5=language_model)


def model_config_to_dict(config: ModelConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def model_config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The inverse of ``model_config_to_dict``; an unknown key raises ``UserError``."""
    return _build(ModelConfig, values, "model")


def replace_fields(config: ModelConfig, overrides: dict[str, Any]) -> ModelConfig:
    """Nested override: ``replace_fields(c, {"vit": {"num_layers": 3}})``; unknown keys are refused."""
    return model_config_from_dict(_merge(model_config_to_dict(config), overrides, "model"))


def _merge(base: dict[str, Any], overrides: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        if key not in base:
            raise UserError(f"unknown key {path}.{key}; known keys: {', '.join(base)}")
        if isinstance(value, dict) and isinstance(base[key], dict):
            value = _merge(base[key], value, f"{path}.{key}")
        merged[key] = value
    return merged


def _build(kind: Any, values: Any, path: str) -> Any:
    """Build dataclass ``kind`` from plain ``values``, recursing into dataclass fields."""
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a mapping of fields, got {values!r}")
    hints = typing.get_type_hints(kind)
    if unknown := set(values) - set(hints):
        raise UserError(f"unknown key {path}.{sorted(unknown)[0]}; known keys: {', '.join(hints)}")
    built: dict[str, Any] = {}
    for key, value in values.items():
        nested = _dataclass_in(hints[key])
        value = tuple(value) if isinstance(value, list) else value  # JSON and YAML know no tuples
        built[key] = _build(nested, value, f"{path}.{key}") if nested and value is not None else value
    return kind(**built)


def _dataclass_in(hint: Any) -> Any:
    """The dataclass that ``X`` or ``X | None`` names, if any."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)
