"""The PyTorch side of ``verify``: modules of ``transformers``, filled from the user's original files.

Nothing here knows our tables. Keys are renamed straight to those of Hugging Face's ``Blip2*``,
``InstructBlip*``, ``Llama*``, ``OPT*`` and ``T5*`` classes and loaded with ``load_state_dict(strict=True)``,
one module at a time, so that a mistake in our tables cannot be made on both sides.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.errors import UserError

from .readers import Source, import_torch

VISION, NORM, QFORMER, LANGUAGE = "vision_model", "vision_model.post_layernorm", "qformer", "language_model"

# Key of LAVIS or MiniGPT-4 -> key of Hugging Face. What matches none of them keeps its name.
_RENAMES = (
    (r"(?:visual_encoder\.)?cls_token", f"{VISION}.embeddings.class_embedding"),
    (r"(?:visual_encoder\.)?pos_embed", f"{VISION}.embeddings.position_embedding"),
    (r"(?:visual_encoder\.)?patch_embed\.proj\.(.*)", rf"{VISION}.embeddings.patch_embedding.\1"),
    (r"(?:visual_encoder\.)?blocks\.(\d+)\.norm([12])\.(.*)", rf"{VISION}.encoder.layers.\1.layer_norm\2.\3"),
    (r"(?:visual_encoder\.)?blocks\.(\d+)\.attn\.proj\.(.*)", rf"{VISION}.encoder.layers.\1.self_attn.projection.\2"),
    (r"(?:visual_encoder\.)?blocks\.(\d+)\.attn\.(.*)", rf"{VISION}.encoder.layers.\1.self_attn.\2"),
    (r"(?:visual_encoder\.)?blocks\.(\d+)\.mlp\.(.*)", rf"{VISION}.encoder.layers.\1.mlp.\2"),
    (r"ln_vision\.(.*)", rf"{NORM}.\1"),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.(.*)", rf"{QFORMER}.layernorm.\1"),
    (r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight", r"embeddings.\1_embeddings.weight"),
    (r"Qformer\.bert\.encoder\.(layer\.\d+\.(?:cross)?attention)\.self\.(.*)", rf"{QFORMER}.encoder.\1.attention.\2"),
    (r"Qformer\.bert\.encoder\.(.*)", rf"{QFORMER}.encoder.\1"),
    (r"Qformer\.(cls\..*)", r"\1"),
    (r"qformer\.embeddings\.layernorm\.(.*)", rf"{QFORMER}.layernorm.\1"),
    (r"qformer\.embeddings\.(word|position)_embeddings\.weight", r"embeddings.\1_embeddings.weight"),
    (r"vision_proj\.(.*)", r"vision_projection.\1"),
    (r"text_proj\.(.*)", r"text_projection.\1"),
    (r"(?:.*\.)?(model\.layers\..*\.lora_[AB])(?:\.default)?\.weight", rf"{LANGUAGE}.\1.weight"),
    (r"((?:model|lm_head|shared|encoder|decoder)\..*)", rf"{LANGUAGE}.\1"),
)


class Reference:
    """The tensors of the original files under Hugging Face's names, and the modules made of them.

    ``config`` gives sizes that LAVIS files do not write down; norms' epsilons and activations are those
    of the original programs, not ours.
    """

    def __init__(self, sources: Mapping[str, Source], config: ModelConfig):
        self.torch = import_torch(next(iter(sources.values())).path)
        self.config, self.sources = config, sources
        model = sources.get("model")
        self.values: Mapping[str, Any] = (model.config or {}) if model is not None else {}
        self._owner: dict[str, tuple[str, str]] = {}
        for role, source in sources.items():
            for key in source.tensors():
                name = _rename(key, config)
                if name not in self._owner or _rank(name, role) > _rank(name, self._owner[name][0]):
                    self._owner[name] = role, key

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._owner)

    @property
    def has_adapters(self) -> bool:
        return any(".lora_A." in name for name in self._owner)

    def tensor(self, name: str) -> Any:
        """One tensor, float32."""
        if name not in self._owner:
            paths = ", ".join(str(source.path) for source in self.sources.values())
            raise UserError(f"{paths}: no tensor for {name}; give the files that the model was converted from")
        role, key = self._owner[name]
        values = self._read(role, key)
        if role == "llm" and "llm_delta" in self.sources:  # FastChat's apply_delta, in the delta's dtype
            total = self._read("llm_delta", key)
            total[: len(values)] += values.to(total.dtype)
            values = total
        return values.float()

    def _read(self, role: str, key: str) -> Any:
        values = np.array(self.sources[role].read(key))  # a copy: the file may be mapped
        if values.dtype.name == "bfloat16":
            return self.torch.from_numpy(values.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(values)

    def load(self, make: Callable[[], Any], prefix: str) -> Any:
        """The module that ``make`` gives, every parameter from the files and every file's key in a parameter."""
        names = [name for name in self._owner if name.startswith(prefix) and not self._is_left_out(name)]
        state = {name.removeprefix(prefix): self.tensor(name) for name in names}
        if "self_attn.q_bias" in state:  # EVA keeps two biases; its keys have none
            query, value = state.pop("self_attn.q_bias"), state.pop("self_attn.v_bias")
            state["self_attn.qkv.bias"] = self.torch.cat([query, self.torch.zeros_like(query), value])
        state.pop("position_ids", None)
        return self._fill(make, state, prefix)

    def _is_left_out(self, name: str) -> bool:
        """Buffers, and adapters that the model has other ones of."""
        is_adapted = self.config.llama is not None and self.config.llama.lora is not None
        is_unused = name.endswith("EncDecAttention.relative_attention_bias.weight")  # of old T5s
        return "rotary_emb" in name or is_unused or (".lora_" in name and not is_adapted)

    def _fill(self, make: Callable[[], Any], state: dict[str, Any], prefix: str) -> Any:
        with self.torch.device("meta"):
            module = make()
        try:
            module.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            raise UserError(f"{prefix.rstrip('.')}: the files do not fit transformers' module ({error})") from error
        return module.eval().requires_grad_(False)

    # The vision transformer

    @cached_property
    def _vision(self) -> Any:
        from transformers import Blip2VisionConfig, InstructBlipVisionConfig

        kind = InstructBlipVisionConfig if self.is_instructblip else Blip2VisionConfig
        vit = self.config.vit
        values = self.values.get("vision_config") or {
            "hidden_size": vit.hidden_size,
            "intermediate_size": vit.mlp_size,
            "num_hidden_layers": vit.num_layers,
            "num_attention_heads": vit.num_heads,
            "patch_size": vit.patch_size,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
        }
        role, key = self._owner[f"{VISION}.embeddings.position_embedding"]
        grid = round((self.sources[role].tensors()[key].shape[1] - 1) ** 0.5)
        return _eager(kind(**{**values, "image_size": grid * vit.patch_size}))

    @property
    def is_instructblip(self) -> bool:
        return self.values.get("model_type") == "instructblip"

    @property
    def is_resized(self) -> bool:
        """Whether the model runs at another image size than the file."""
        return self._vision.image_size != self.config.vit.image_size

    def vision_embeddings(self) -> Any:
        make = self._class("VisionEmbeddings")
        return self.load(lambda: make(self._vision), f"{VISION}.embeddings.")

    def vision_layer(self, index: int) -> Any:
        make = self._class("EncoderLayer")
        return self.load(lambda: make(self._vision), f"{VISION}.encoder.layers.{index}.")

    def vision_norm(self) -> Any:
        """``ln_vision``; a MiniGPT-4 without Q-Former never loads one and keeps PyTorch's initial values."""
        eps, size = self.values.get("vision_config", {}).get("layer_norm_eps", 1e-5), self.config.vit.hidden_size
        if not self.has(NORM):
            return self.torch.nn.LayerNorm(size, eps=1e-5).eval().requires_grad_(False)
        return self.load(lambda: self.torch.nn.LayerNorm(size, eps=eps), f"{NORM}.")

    def _class(self, name: str) -> Any:
        if self.is_instructblip:
            from transformers.models.instructblip import modeling_instructblip

            return getattr(modeling_instructblip, f"InstructBlip{name}")
        from transformers.models.blip_2 import modeling_blip_2

        return getattr(modeling_blip_2, f"Blip2{name}")

    # The Q-Former

    @cached_property
    def qformer_config(self) -> Any:
        from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig

        reader = self.config.qformer
        values = self.values.get("qformer_config") or {
            "hidden_size": reader.hidden_size,
            "intermediate_size": reader.mlp_size,
            "num_hidden_layers": reader.num_layers,
            "num_attention_heads": reader.num_heads,
            "cross_attention_frequency": reader.cross_attention_frequency,
            "encoder_hidden_size": reader.encoder_size,
            "layer_norm_eps": 1e-12,
        }
        if self.is_instructblip:
            return _eager(InstructBlipQFormerConfig(**values))
        words = "embeddings.word_embeddings.weight"
        text: dict[str, Any] = {"use_qformer_text_input": self.has(f"{QFORMER}.encoder.layer.0.intermediate.dense")}
        if words in self._owner:
            rows, places = (self.shape(f"embeddings.{kind}_embeddings.weight")[0] for kind in ("word", "position"))
            text |= {"vocab_size": rows, "max_position_embeddings": places}
        return _eager(Blip2QFormerConfig(**{**values, **text}))

    def shape(self, name: str) -> tuple[int, ...]:
        role, key = self._owner[name]
        return self.sources[role].tensors()[key].shape

    def qformer_norm(self) -> Any:
        config = self.qformer_config
        norm = self.torch.nn.LayerNorm
        return self.load(lambda: norm(config.hidden_size, eps=config.layer_norm_eps), f"{QFORMER}.layernorm.")

    def text_embeddings(self) -> Any:
        from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

        return self.load(lambda: Blip2TextEmbeddings(self.qformer_config), "embeddings.")

    def qformer_layer(self, index: int) -> Any:
        make = self._class("QFormerLayer")
        return self.load(lambda: make(self.qformer_config, index), f"{QFORMER}.encoder.layer.{index}.")

    def caption_head(self) -> Any:
        """BERT's prediction head; its decoder is the word embedding under a second name."""
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertLMPredictionHead

        reader = self.qformer_config
        config = BertConfig(
            vocab_size=reader.vocab_size, hidden_size=reader.hidden_size, layer_norm_eps=reader.layer_norm_eps
        )
        return self.load(lambda: BertLMPredictionHead(config), "cls.predictions.")

    def linear(self, name: str) -> Any:
        """vision_projection, text_projection, itm_head or language_projection."""
        outputs, inputs = self.shape(f"{name}.weight")
        return self.load(lambda: self.torch.nn.Linear(inputs, outputs), f"{name}.")

    # The language model

    @cached_property
    def llama_config(self) -> Any:
        from transformers import LlamaConfig

        return _eager(LlamaConfig.from_dict(dict(self._language_values())))

    def _language_values(self) -> Mapping[str, Any]:
        source = self.sources.get("llm_delta") or self.sources.get("llm")
        values = self.values.get("text_config", self.values) if source is None else source.config
        return values or {}

    def llama_embeddings(self) -> Any:
        config = self.llama_config
        make = self.torch.nn.Embedding
        return self.load(lambda: make(config.vocab_size, config.hidden_size), f"{LANGUAGE}.model.embed_tokens.")

    def llama_layer(self, index: int) -> Any:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        prefix = f"{LANGUAGE}.model.layers.{index}."
        return self.load(lambda: self._adapted(LlamaDecoderLayer(self.llama_config, index), prefix), prefix)

    def _adapted(self, layer: Any, prefix: str) -> Any:
        """``layer`` with peft's formula in the place of each matrix that has an adapter."""
        lora, nn = self.config.llama.lora, self.torch.nn
        if lora is None:
            return layer

        class Adapted(nn.Linear):
            def __init__(self, inputs: int, outputs: int):
                super().__init__(inputs, outputs, bias=False)
                self.lora_A = nn.Linear(inputs, lora.rank, bias=False)
                self.lora_B = nn.Linear(lora.rank, outputs, bias=False)

            def forward(self, x: Any) -> Any:
                return super().forward(x) + self.lora_B(self.lora_A(x)) * (lora.alpha / lora.rank)

        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                path = f"{prefix}{'mlp' if block is layer.mlp else 'self_attn'}.{name}"
                if f"{path}.lora_A.weight" in self._owner:
                    setattr(block, name, Adapted(linear.in_features, linear.out_features))
        return layer

    def llama_rotary(self, positions: Any) -> tuple[Any, Any]:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        return LlamaRotaryEmbedding(self.llama_config)(self.torch.zeros(()), positions)

    def llama_norm(self) -> Any:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        config = self.llama_config
        return self.load(lambda: LlamaRMSNorm(config.hidden_size, config.rms_norm_eps), f"{LANGUAGE}.model.norm.")

    def llama_head(self) -> Any:
        config = self.llama_config
        name = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        make = self.torch.nn.Linear
        return self.load(lambda: make(config.hidden_size, config.vocab_size, bias=False), f"{LANGUAGE}.{name}.")

    # OPT

    @cached_property
    def opt_config(self) -> Any:
        from transformers import OPTConfig

        return _eager(OPTConfig.from_dict(dict(self._language_values())))

    def opt_embeddings(self) -> Any:
        config, make = self.opt_config, self.torch.nn.Embedding
        return self._opt(lambda: make(config.vocab_size, config.word_embed_proj_dim), "embed_tokens")

    def opt_positions(self) -> Any:
        from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

        config = self.opt_config
        make = partial(OPTLearnedPositionalEmbedding, config.max_position_embeddings, config.hidden_size)
        return self._opt(make, "embed_positions")

    def opt_project_in(self) -> Any:
        config = self.opt_config
        make = partial(self.torch.nn.Linear, config.word_embed_proj_dim, config.hidden_size, bias=False)
        return self._opt(make, "project_in")

    def opt_layer(self, index: int) -> Any:
        from transformers.models.opt.modeling_opt import OPTDecoderLayer

        return self._opt(lambda: OPTDecoderLayer(self.opt_config, index), f"layers.{index}")

    def opt_head(self) -> Any:
        """From the last layer to the logits: norm, projection, embedding."""
        config, nn = self.opt_config, self.torch.nn
        parts = []
        if config.do_layer_norm_before:
            parts.append(self._opt(lambda: nn.LayerNorm(config.hidden_size), "final_layer_norm"))
        if config.word_embed_proj_dim != config.hidden_size:
            make = partial(nn.Linear, config.hidden_size, config.word_embed_proj_dim, bias=False)
            parts.append(self._opt(make, "project_out"))
        parts.append(
            self._opt(partial(nn.Linear, config.word_embed_proj_dim, config.vocab_size, False), "embed_tokens")
        )
        return nn.Sequential(*parts)

    def _opt(self, make: Callable[[], Any], name: str) -> Any:
        root = "model.decoder" if self.has(f"{LANGUAGE}.model.") else "decoder"  # without a head
        return self.load(make, f"{LANGUAGE}.{root}.{name}.")

    # T5

    @cached_property
    def t5_config(self) -> Any:
        from transformers import T5Config

        values = dict(self._language_values())
        if self.config.vit is not None and "model" not in self.sources:
            values["dense_act_fn"] = "gelu"  # as LAVIS sets it
        return _eager(T5Config.from_dict(values))

    def t5_embeddings(self) -> Any:
        config, make = self.t5_config, self.torch.nn.Embedding
        names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
        name = next(name for name in names if self.has(f"{LANGUAGE}.{name}."))
        return self.load(lambda: make(config.vocab_size, config.d_model), f"{LANGUAGE}.{name}.")

    def t5_layer(self, tower: str, index: int) -> Any:
        from transformers.models.t5.modeling_t5 import T5Block

        config = copy.deepcopy(self.t5_config)
        config.is_decoder = tower == "decoder"
        prefix = f"{LANGUAGE}.{tower}.block.{index}."
        return self.load(lambda: T5Block(config, index == 0, index), prefix)

    def t5_norm(self, tower: str) -> Any:
        from transformers.models.t5.modeling_t5 import T5LayerNorm

        config = self.t5_config
        make = partial(T5LayerNorm, config.d_model, config.layer_norm_epsilon)
        return self.load(make, f"{LANGUAGE}.{tower}.final_layer_norm.")

    def t5_head(self) -> Any:
        config, name = self.t5_config, f"{LANGUAGE}.lm_head."
        make = partial(self.torch.nn.Linear, config.d_model, config.vocab_size, bias=False)
        if self.has(name):
            return self.load(make, name)
        head = make(device="meta")
        head.weight = self.t5_embeddings().weight
        return head

    def t5_logit_scale(self) -> float:
        return self.t5_config.d_model**-0.5 if self.t5_config.scale_decoder_outputs else 1.0


def _rename(key: str, config: ModelConfig) -> str:
    """A projection into another kind of language model, which BLIP-2's files may hold, keeps its name."""
    own = "t5" if config.t5 is not None else "opt" if config.opt is not None else "llama|llm"
    for pattern, name in (*_RENAMES, (rf"(?:{own})_proj\.(.*)", r"language_projection.\1")):
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    return key


def _rank(name: str, role: str) -> tuple[bool, bool]:
    """Which of two files with the same tensor counts: a trained checkpoint, then the file named for that side."""
    side = "vit" if name.startswith(VISION) and not name.startswith(NORM) else "qformer"
    return role == "projection", role == side


def _eager(config: Any) -> Any:
    """Attention by its definition, without fused kernels."""
    config._attn_implementation = "eager"
    return config
