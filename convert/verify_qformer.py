"""``verify``'s walk through the Q-Former: every layer, then every use (queries, joint, text, captions, heads)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgpt4_jax.config import ModelConfig, QformerConfig
from mgpt4_jax.models import masks
from mgpt4_jax.models.blip2 import Blip2, unit
from mgpt4_jax.models.qformer import Qformer, QformerLayer

from .comparison import Comparison, compare_step, linear, same_values, twice
from .reference import Reference

_TEXT = 11


@dataclass(frozen=True)
class _Use:
    """Who takes part in a pass, and who sees whom (None: everybody)."""

    name: str
    num_queries: int
    ids: np.ndarray | None = None
    mask: Any = None


def compare_qformer(table: Comparison, reference: Reference, image: np.ndarray) -> np.ndarray:
    """``image`` holds our tokens, then PyTorch's; so does the result, the queries' last states."""
    config, model = table.manifest.config.qformer, table.manifest.config
    params = table.params("qformer")
    layers = [reference.qformer_layer(index) for index in range(config.num_layers)]
    query_tokens = reference.tensor("query_tokens")
    table.add("qformer/query_tokens", params["query_tokens"], query_tokens[0])
    ends: dict[str, np.ndarray] = {}
    for use in _uses(config):
        embedded = _embed(reference, use, query_tokens, image.shape[0] // 2)
        if not ends:
            _compare_layers(table, config, params, layers, use, embedded, np.split(image, 2)[1])
        ends[use.name] = _compare_use(table, config, params, layers, use, embedded, image)
    q = config.num_queries
    if config.with_text:
        modules = reference.torch.nn.ModuleList([reference.text_embeddings(), reference.qformer_norm()])
        words = params["embeddings"]["word"]["embedding"]
        theirs = modules[0].word_embeddings.weight
        table.add("qformer/embeddings", words, theirs, same_values(params["embeddings"], modules))
    if config.with_lm_head:
        _compare_captions(table, reference, params, ends["caption"][:, q:])
    if model.architecture == "blip2":
        _compare_heads(table, reference, ends)
    is_instructed = config.with_text and model.language_model is not None
    return ends["joint" if is_instructed else "queries"][:, :q]


def _uses(config: QformerConfig) -> list[_Use]:
    """The widest comes first: it reaches every parameter of the layers."""
    q = config.num_queries
    if not config.with_text:
        return [_Use("queries", q)]
    t = min(_TEXT, config.max_positions)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, t))
    valid = jnp.arange(t)[None] < jnp.array([[t], [t - t // 3]])
    return [
        _Use("joint", q, ids, masks.bidirectional_mask(q, valid)),
        _Use("text", 0, ids, masks.padding_mask(valid)),
        _Use("caption", q, ids, masks.multimodal_causal_mask(q, valid)),
        _Use("queries", q),
    ]


def _embed(reference: Reference, use: _Use, query_tokens: Any, rows: int) -> Any:
    """PyTorch's embeddings of ``[queries ; text]``."""
    parts = [query_tokens.expand(rows, -1, -1)] if use.num_queries else []
    if use.ids is not None:
        ids = reference.torch.from_numpy(use.ids)
        places = reference.torch.arange(ids.shape[1])[None]
        parts.append(reference.text_embeddings()(input_ids=ids, position_ids=places))
    return reference.qformer_norm()(reference.torch.cat(parts, dim=1))


def _run_layer(layer: Any, use: _Use, x: Any, image: np.ndarray) -> Any:
    """One PyTorch layer, with our boolean mask as the additive one of BERT."""
    import torch

    mask = None
    if use.mask is not None:
        mask = torch.where(torch.from_numpy(np.array(use.mask)), 0.0, torch.finfo(torch.float32).min)[:, None]
    return layer(x, mask, torch.from_numpy(np.array(image)), query_length=use.num_queries)


def _compare_layers(
    table: Comparison,
    config: QformerConfig,
    params: Any,
    layers: list[Any],
    use: _Use,
    x: Any,
    image: np.ndarray,
) -> None:
    for index, layer in enumerate(layers):
        group, place = divmod(index, config.cross_attention_frequency)
        is_stacked = group < config.num_layers // config.cross_attention_frequency
        own = params["layers" if is_stacked else "tail"][f"layer_{place}"]
        if is_stacked:
            own = jax.tree.map(lambda leaf, group=group: leaf[group], own)
        module = QformerLayer(config, use.num_queries, place == 0, True, jnp.float32)
        ours = _apply_layer(module, own, x.numpy(), use.mask, image)
        x = _run_layer(layer, use, x, image)
        weights = None if _has_unused_text(config, layer) else same_values(own, layer)
        table.add(f"qformer/layers/{index}", ours, x, weights)
        table.layer_done()


@partial(jax.jit, static_argnums=0)
def _apply_layer(module: QformerLayer, params: Any, x: Any, mask: Any, image: Any) -> jax.Array:
    return module.apply({"params": params}, x, mask, image, None, None, None)[0]


def _has_unused_text(config: QformerConfig, layer: Any) -> bool:
    """The file has a text side that the model leaves out."""
    return not config.with_text and hasattr(layer, "intermediate")


def _compare_use(
    table: Comparison,
    config: QformerConfig,
    params: Any,
    layers: list[Any],
    use: _Use,
    embedded: Any,
    image: np.ndarray,
) -> np.ndarray:
    """The whole Q-Former, ours as it is compiled for use."""
    ids, mask = (None if x is None else twice(np.asarray(x)) for x in (use.ids, use.mask))
    tokens = image if use.num_queries else None
    apply = partial(Qformer(config).apply, mutable="intermediates")
    out, sown = jax.jit(apply)({"params": params}, tokens, ids, mask=mask)
    ours = np.asarray(sown["intermediates"]["embedded"][0])
    table.add(f"qformer/{use.name}/embeddings", np.split(ours, 2)[1], embedded)
    x, theirs = embedded, np.split(image, 2)[1]
    for layer in layers:
        x = _run_layer(layer, use, x, theirs)
    chained, local = np.split(np.concatenate([out.queries, out.text], axis=1), 2)
    table.add(f"qformer/{use.name}, all layers", local, x)
    return np.concatenate([chained, x.numpy()])


def _compare_captions(table: Comparison, reference: Reference, params: Any, text: np.ndarray) -> None:
    config: QformerConfig = table.manifest.config.qformer
    head = reference.caption_head()
    run = partial(Qformer(config).apply, {"params": params}, method=Qformer.lm_logits)
    own = {"head": params["lm_head"], "decoder": [params["embeddings"]["word"], params["lm_head"]["bias"]]}
    compare_step(table, "qformer/lm_head", text, jax.jit(run), head, same_values(own, head))


def _compare_heads(table: Comparison, reference: Reference, ends: dict[str, np.ndarray]) -> None:
    """Contrastive features and their similarity, matching logits, temperature."""
    config: ModelConfig = table.manifest.config
    q = config.qformer.num_queries
    features, normalize = {}, reference.torch.nn.functional.normalize
    for name, theirs_name, states in (
        ("vision_proj", "vision_projection", ends["queries"]),
        ("text_proj", "text_projection", ends["text"]),
    ):
        module, params = reference.linear(theirs_name), table.params(name)
        features[name] = compare_step(
            table,
            name,
            states,
            lambda x, params=params: unit(linear(params, x)),
            lambda x, module=module: normalize(module(x), dim=-1),
            same_values(params, module),
        )
    ours, theirs = (
        (image, text[:, 0])
        for image, text in zip(np.split(features["vision_proj"], 2), np.split(features["text_proj"], 2), strict=True)
    )
    similarity = np.einsum("iqc,bc->ibq", *theirs).max(-1)
    table.add("similarity (ITC), from the picture on", Blip2.similarity(*map(jnp.asarray, ours)), similarity)
    module, params = reference.linear("itm_head"), table.params("itm_head")
    pair = compare_step(
        table,
        "itm_head",
        ends["joint"][:, :q],
        lambda x: linear(params, x).mean(axis=1),
        lambda x: module(x).mean(dim=1),
        same_values(params, module),
    )
    table.add_pair("matching logits (ITM), from the picture on", pair)
    if reference.has("temp"):
        table.add("temp", table.leaf("temp"), reference.tensor("temp"))
