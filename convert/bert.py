"""Where stage 1 begins: the text side of the Q-Former from a BERT of Hugging Face, all else random (LAVIS).

``Blip2Base.init_Qformer`` and ``Blip2Qformer.__init__`` with ``bert-base-uncased``: each feed-forward of the queries
begins as a copy of its twin of the text; what it lacks (cross-attention, queries, heads) is drawn as PyTorch draws it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mgpt4_jax.config import ModelConfig, QformerConfig
from mgpt4_jax.errors import UserError

from . import llama, qformer
from .hf_config import Values, require
from .inferred import Inferred, Overrides, apply_overrides, check_config
from .lavis import LavisFiles
from .readers import Source, TensorInfo
from .rules import Alias, Entry, Fill, Ignore, Part, Rule
from .transforms import Shape, Transform

Make = Callable[[Shape], np.ndarray]

_SPREAD = 0.02  # BERT's initializer_range
_SEED = 0
_WORDS, _BIAS = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
_COPIED = (
    "the text side of the Q-Former and its captioning head are BERT's, and each feed-forward of the queries begins as "
    "a copy of its twin of the text; [DEC] is the word that was added"
)


def infer_bert(sources: Mapping[str, Source], overrides: Overrides) -> Inferred:
    """A ``blip2`` model of the roles ``vit`` and ``bert``; the overrides say what is not as published.

    For example ``{"qformer": {"num_queries": 6}, "projection_size": 16}``.
    """
    bert = sources["bert"]
    if "vit" not in sources:
        raise UserError(f"{bert.path}: stage 1 begins with BERT and a vision transformer; add --vit eva_vit_g.pth")
    tower = LavisFiles({"vit": sources["vit"]}, overrides, False).infer()
    reader = _qformer_config(bert, tower.config.vit.hidden_size)
    config = apply_overrides(ModelConfig("blip2", tower.config.vit, reader), overrides)
    check_config(config, f"{sources['vit'].path}, {bert.path}")
    table = [*bert_qformer(config.qformer, bert.tensors()), *untrained_heads(config)]
    parts = [*tower.parts, Part(str(bert.path), bert.tensors(), table, bert)]
    return Inferred(config, parts, "none", tower.resized, remarks=[_COPIED])


def _qformer_config(bert: Source, encoder_size: int) -> QformerConfig:
    """Sizes from ``config.json``; 32 queries, and cross-attention in every second layer."""
    file, values = f"{bert.path}/config.json", bert.config or {}
    if values.get("model_type") != "bert":
        raise UserError(f"{file}: model_type is {values.get('model_type')!r}; --bert wants bert-base-uncased")
    if _BIAS not in bert.tensors():
        raise UserError(f"{bert.path}: lacks {_BIAS}; --bert wants bert-base-uncased with its prediction head")
    require(values, file, "hidden_act", "gelu", "gelu")
    require(values, file, "position_embedding_type", "absolute", "absolute")
    return QformerConfig(
        hidden_size=_size(values, file, "hidden_size"),
        mlp_size=_size(values, file, "intermediate_size"),
        num_layers=_size(values, file, "num_hidden_layers"),
        num_heads=_size(values, file, "num_attention_heads"),
        encoder_size=encoder_size,
        layer_norm_eps=values.get("layer_norm_eps", 1e-12),
        with_text=True,
        with_lm_head=True,
        vocab_size=_size(values, file, "vocab_size") + 1,  # and [DEC]
        max_positions=_size(values, file, "max_position_embeddings"),
        dropout=values.get("hidden_dropout_prob", 0.1),
    )


def _size(values: Values, file: str, key: str) -> int:
    if type(values.get(key)) is not int:
        raise UserError(f"{file}: {key} must be a whole number, got {values.get(key)!r}")
    return values[key]


def bert_qformer(config: QformerConfig, keys: Mapping[str, TensorInfo]) -> list[Entry]:
    """The table of a file of LAVIS, as far as BERT has it; what it lacks begins random."""
    written = qformer.lavis_qformer(config)
    rules = [entry for entry in written if isinstance(entry, Rule)]
    queries = [rule for rule in rules if "_query." in rule.source]
    twins = {(rule.source.replace("_query.", "."), rule.layers): rule.targets for rule in queries}
    table: list[Entry] = []
    for rule in rules:
        if rule.source == "query_tokens" or ".crossattention." in rule.source:
            table += [_fresh(target) for target in rule.targets]
        elif rule not in queries:
            table.append(_of_bert(rule, twins.get((rule.source, rule.layers), ()), config.vocab_size))
    aliases = [entry for entry in written if isinstance(entry, Alias)]
    table += [Alias(_without_prefix(alias.source), _without_prefix(alias.of)) for alias in aliases]
    if any(key.endswith("LayerNorm.gamma") for key in keys):
        table = [_with_old_names(entry) for entry in table]
    return [
        *table,
        Ignore(r"bert\.embeddings\.position_ids", qformer.BUFFER),
        Ignore(r"bert\.embeddings\.token_type_embeddings\.weight", "the Q-Former knows no kinds of segments"),
        Ignore(r"bert\.pooler\.dense\.(weight|bias)", "BERT's pooler: the Q-Former takes the state of [CLS] itself"),
        Ignore(r"cls\.seq_relationship\.(weight|bias)", "BERT's next-sentence head: not part of this model"),
    ]


def _of_bert(rule: Rule, twin: Sequence[str], rows: int) -> Rule:
    """The rule under BERT's name; a feed-forward fills its twin too, and words get one row more."""
    source = _without_prefix(rule.source)
    if source in (_WORDS, _BIAS):
        shape = (rows - 1, *rule.shape[1:])
        return Rule(source, rule.targets, with_new_row(is_drawn=source == _WORDS), shape)
    if twin:
        return Rule(source, (*rule.targets, *twin), twice(rule.transform), rule.shape, rule.layers)
    return dataclasses.replace(rule, source=source)


def _without_prefix(name: str) -> str:
    return name.removeprefix("Qformer.")


def _with_old_names(entry: Entry) -> Entry:
    """Norms as files of TensorFlow's time call them."""
    if not isinstance(entry, Rule):
        return entry
    source = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", entry.source)
    return dataclasses.replace(entry, source=re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", source))


def twice(transform: Transform) -> Transform:
    """One tensor fills two parameters alike."""

    def forward(x: np.ndarray) -> tuple[np.ndarray, ...]:
        (made,) = transform.forward(x)
        return made, made

    return Transform(f"twice({transform.name})", forward, lambda parts, shape: transform.inverse(parts[:1], shape))


def with_new_row(*, is_drawn: bool) -> Transform:
    """One row more, for [DEC]: as ``resize_token_embeddings`` draws it, or zero (of a bias)."""

    def forward(x: np.ndarray) -> tuple[np.ndarray, ...]:
        row = (1, *x.shape[1:])
        new = normal("[DEC]", row) if is_drawn else np.zeros(row)
        return (np.concatenate([x, new.astype(x.dtype)]),)

    return Transform("with_new_row", forward, lambda parts, shape: parts[0][:-1])


def _fresh(target: str) -> Fill:
    """How ``BertPreTrainedModel`` begins a parameter that the file lacks."""
    name = target.split("/")[-1]
    if name in ("scale", "bias"):
        return llama.constant(target, float(name == "scale"), "cross-attention: norms begin at 1, every bias at 0")
    return Fill(target, functools.partial(normal, target), f"BERT lacks it: it begins random, normal with {_SPREAD}")


def untrained_heads(config: ModelConfig) -> list[Entry]:
    """Contrastive projections and matching head as ``torch.nn.Linear`` begins them, and the temperature."""
    bound = config.qformer.hidden_size**-0.5
    reason = f"a head that must be trained: it begins random, uniform within {bound:.4f}"
    leaves = [f"{head}/{name}" for head in ("vision_proj", "text_proj", "itm_head") for name in ("kernel", "bias")]
    fills: list[Entry] = [Fill(leaf, _uniform(leaf, bound), reason) for leaf in leaves]
    return [*fills, llama.constant("temp", 0.07, "the temperature: its initial value")]


def normal(name: str, shape: Shape) -> np.ndarray:
    """Float32; the same for the same name, whatever else is drawn."""
    return _generator(name).normal(0, _SPREAD, shape).astype(np.float32)


def _uniform(name: str, bound: float) -> Make:
    return lambda shape: _generator(name).uniform(-bound, bound, shape).astype(np.float32)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng([_SEED, zlib.crc32(name.encode())])
