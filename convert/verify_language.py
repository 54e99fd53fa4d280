"""``verify``'s walks through OPT and T5: embeddings, every layer, the head, over random text with padding."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgpt4_jax.config import OptConfig, T5Config
from mgpt4_jax.models import masks
from mgpt4_jax.models.layers import rms_norm
from mgpt4_jax.models.opt import POSITION_OFFSET, Opt, OptLayer, text_positions
from mgpt4_jax.models.t5 import T5, T5DecoderLayer, T5EncoderLayer, relative_buckets

from .comparison import Comparison, compare_step, same_values, twice
from .reference import Reference

_TOKENS, _ANSWER = 136, 70  # a mistake of positions passes on four tokens


def _text(vocab_size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids [1 t], and which of them are not padding, which stands on both sides and is not compared."""
    place = np.arange(length)[None]
    ids = np.random.default_rng(length).integers(0, vocab_size, (1, length))
    return ids, (place >= 7) & (place < length - 5)


def _additive(mask: Any) -> Any:
    import torch

    return torch.where(torch.from_numpy(np.array(mask)), 0.0, torch.finfo(torch.float32).min)[:, None]


def _valid_only(pair: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return np.concatenate([half[valid] for half in np.split(pair, 2)])


def compare_opt(table: Comparison, reference: Reference) -> None:
    config = table.manifest.config.opt
    ids, valid = _text(config.vocab_size, min(_TOKENS, config.max_positions))
    mask = masks.causal_mask(ids.shape[1]) & masks.padding_mask(jnp.asarray(valid))
    pair = _opt_embeddings(table, reference, config, ids, valid)
    additive, shared = _additive(mask), twice(np.asarray(mask))
    layer = jax.jit(lambda params, x: OptLayer(config).apply({"params": params}, x, shared)[0])
    for index in range(config.num_layers):
        module, params = reference.opt_layer(index), table.params("opt/layers", index)
        theirs = partial(module, attention_mask=additive)
        weights = same_values(params, module)
        pair = compare_step(table, f"opt/layers/{index}", pair, partial(layer, params), theirs, weights, valid)
        table.layer_done()

    head = reference.opt_head()
    names = ["embed_tokens"] + ["final_norm"] * config.norm_first
    names += ["project_out"] * (config.embed_size != config.hidden_size)
    params = {name: table.params(f"opt/{name}") for name in names}
    ours = partial(Opt(config).apply, {"params": params}, method=Opt.logits)
    logits = compare_step(table, "opt/logits", _valid_only(pair, valid), ours, head, same_values(params, head))
    table.add_pair("opt/logits, from the text on", logits)


def _opt_embeddings(
    table: Comparison, reference: Reference, config: OptConfig, ids: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """What goes into the first layer: ours, then PyTorch's."""
    import torch

    words, places = reference.opt_embeddings(), reference.opt_positions()
    params = {name: table.params(f"opt/{name}") for name in ("embed_tokens", "embed_positions")}
    ours = Opt(config).apply({"params": params}, ids, method=Opt.embed)
    theirs = words(torch.from_numpy(ids))
    table.add("opt/embed_tokens", ours, theirs, same_values(params["embed_tokens"], words))
    if config.embed_size != config.hidden_size:
        project, kernel = reference.opt_project_in(), table.params("opt/project_in")["kernel"]
        ours, theirs = ours @ kernel, project(theirs)
        table.add("opt/project_in", ours, theirs, same_values(kernel, project))
    rows = np.asarray(text_positions(jnp.asarray(valid))) + POSITION_OFFSET
    ours = np.asarray(ours + params["embed_positions"]["embedding"][rows])
    theirs = (theirs + places(torch.from_numpy(valid.astype(np.int64)))).numpy()
    table.add("opt/embed_positions", ours[valid], theirs[valid], same_values(params["embed_positions"], places))
    return np.concatenate([ours, theirs])


def compare_t5(table: Comparison, reference: Reference) -> None:
    """Encoder and decoder; each side's decoder reads the states of its own encoder."""
    config = table.manifest.config.t5
    ids, valid = _text(config.vocab_size, _TOKENS)
    answer, _ = _text(config.vocab_size, _ANSWER)
    shape = (1, _ANSWER, _ANSWER)
    causal, everywhere = np.broadcast_to(np.asarray(masks.causal_mask(_ANSWER)), shape), np.ones((1, _ANSWER), bool)

    encoded = _t5_embeddings(table, reference, config, ids)
    mask = np.asarray(masks.padding_mask(jnp.asarray(valid)))
    shared = _t5_positions(table, reference, config, "encoder", _TOKENS)
    encoder = jax.jit(lambda params, x: T5EncoderLayer(config).apply({"params": params}, x, twice(mask), shared[0])[0])
    for index in range(config.num_layers):
        module, params = reference.t5_layer("encoder", index), table.params("t5/encoder/layers", index)
        theirs = partial(_first, module, attention_mask=_additive(mask), position_bias=shared[1])
        weights = same_values(params, _without_positions(module))
        name = f"t5/encoder/layers/{index}"
        encoded = compare_step(table, name, encoded, partial(encoder, params), theirs, weights, valid)
        table.layer_done()
    encoded = _t5_norm(table, reference, config, "encoder", encoded, valid)

    pair = _t5_embeddings(table, reference, config, answer)
    bias = _t5_positions(table, reference, config, "decoder", _ANSWER)
    inputs = (encoded, twice(causal), twice(mask), bias[0])
    decoder = jax.jit(lambda params, x: T5DecoderLayer(config).apply({"params": params}, x, *inputs)[0])
    states = reference.torch.from_numpy(np.array(np.split(encoded, 2)[1]))
    for index in range(config.num_decoder_layers):
        module, params = reference.t5_layer("decoder", index), table.params("t5/decoder/layers", index)
        theirs = partial(
            _first,
            module,
            attention_mask=_additive(causal),
            position_bias=bias[1],
            encoder_hidden_states=states,
            encoder_attention_mask=_additive(mask),
        )
        weights = same_values(params, _without_positions(module))
        pair = compare_step(table, f"t5/decoder/layers/{index}", pair, partial(decoder, params), theirs, weights)
        table.layer_done()
    pair = _t5_norm(table, reference, config, "decoder", pair, everywhere)

    head, name = reference.t5_head(), "shared" if config.tie_embeddings else "lm_head"
    params = {name: table.params(f"t5/{name}")}
    ours = partial(T5(config).apply, {"params": params}, method=T5.logits)
    scale = reference.t5_logit_scale()
    logits = compare_step(table, "t5/logits", pair, ours, lambda x: head(x * scale), same_values(params, head))
    table.add_pair("t5/logits, from the text on", logits)


def _first(module: Any, x: Any, **inputs: Any) -> Any:
    return module(x, **inputs)[0]


def _without_positions(module: Any) -> Any:
    """A block without the table of positions that the first one keeps for all."""
    attention = module.layer[0].SelfAttention
    if hasattr(attention, "relative_attention_bias"):
        del attention.relative_attention_bias
    return module


def _t5_embeddings(table: Comparison, reference: Reference, config: T5Config, ids: np.ndarray) -> np.ndarray:
    import torch

    module, params = reference.t5_embeddings(), table.params("t5/shared")
    ours = np.asarray(T5(config).apply({"params": {"shared": params}}, ids, method=T5.embed))
    theirs = module(torch.from_numpy(ids)).numpy()
    table.add(f"t5/shared ({ids.shape[1]} tokens)", ours, theirs, same_values(params, module))
    return np.concatenate([ours, theirs])


def _t5_positions(
    table: Comparison, reference: Reference, config: T5Config, tower: str, length: int
) -> tuple[np.ndarray, Any]:
    """What every layer adds to its logits: ours [n t t], and PyTorch's [1 n t t]."""
    attention = reference.t5_layer(tower, 0).layer[0].SelfAttention
    theirs, place = attention.compute_bias(length, length), jnp.arange(length)
    values = table.leaf(f"t5/{tower}/relative_bias")
    buckets = relative_buckets(config, place, place, is_bidirectional=tower == "encoder")
    ours = values[np.asarray(buckets)].transpose(2, 0, 1)
    weights = same_values(values, attention.relative_attention_bias)
    table.add(f"t5/{tower}/relative_bias", ours, theirs[0], weights)
    return ours, theirs


def _t5_norm(
    table: Comparison, reference: Reference, config: T5Config, tower: str, pair: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    norm, params = reference.t5_norm(tower), table.params(f"t5/{tower}/norm")
    module = rms_norm(config.layer_norm_eps, name="norm", dtype=jnp.float32)
    ours = partial(module.apply, {"params": params})
    return compare_step(table, f"t5/{tower}/norm", pair, ours, norm, same_values(params, norm), valid)
