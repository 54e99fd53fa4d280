"""Q-Former in every mode: queries, text, both, and text on cached queries, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import Case, recorded
from claims import QFORMER
from comparing import LOSS, Compare
from conversion import Converted

from mgpt4_jax.losses import IGNORED, caption_loss, token_losses
from mgpt4_jax.models.masks import bidirectional_mask, decode_mask, multimodal_causal_mask, padding_mask
from mgpt4_jax.models.qformer import Qformer, QformerCache, empty_qformer_cache
from mgpt4_jax.typing import Array

LABEL_SMOOTHING = 0.1  # of BLIP-2's caption loss


def run(converted: Converted) -> dict[str, Any]:
    """Every quantity by its recorded name, from one compiled program."""
    config, given = converted.case.config, {name: jnp.asarray(x) for name, x in converted.case.inputs.items()}
    ids = given["text_ids"].at[:, 0].set(config["dec_token_id"])
    given["decoder_ids"], given["labels"] = ids, jnp.where(ids == config["pad_token_id"], IGNORED, ids)
    return jax.jit(lambda given: everything(converted, given))(given)


def everything(converted: Converted, given: dict[str, Array]) -> dict[str, Any]:
    config = converted.config.qformer
    variables = {"params": converted.params["qformer"]}
    images, valid = given["image_embeds"], given["text_mask"].astype(bool)
    q, t = config.num_queries, valid.shape[1]

    def forward(name: str, *inputs: Array | None, **options: Any) -> tuple[dict[str, Array], Any]:
        out, state = Qformer(config).apply(variables, *inputs, **options, mutable=["intermediates"])
        sown = state["intermediates"]
        states = jnp.concatenate([out.queries, out.text], axis=1)
        hidden = {f"{name}_layer_{index}": layer for index, layer in enumerate(layers_of(sown))}
        return {f"{name}_embeddings": sown["embedded"][0], **hidden, f"{name}_last": states}, out

    room = {"mask": decode_mask(jnp.full((1, 1), q - 1), q + t), "start": 0}
    cache = empty_qformer_cache(config, images.shape[0], q + t)
    image_mask = padding_mask(given["image_atts"].astype(bool))
    image_only, image_out = forward("image_only", images, image_mask=image_mask, cache=cache, **room)
    text_only, _ = forward("text_only", None, given["text_ids"], mask=padding_mask(valid))
    both, _ = forward("multimodal", images, given["text_ids"], mask=bidirectional_mask(q, valid))
    masked, _ = forward("image_only_masked", images, image_mask=padding_mask(given["image_atts_masked"].astype(bool)))

    def caption(name: str, *inputs: Array | None, **options: Any) -> dict[str, Array]:
        def logits(qformer: Qformer) -> Array:
            return qformer.lm_logits(qformer(*inputs, **options).text)

        scores = Qformer(config).apply(variables, method=logits)
        targets = given["labels"]
        loss, _ = caption_loss(scores, targets, label_smoothing=LABEL_SMOOTHING)
        per_token, _ = token_losses(scores, targets, label_smoothing=LABEL_SMOOTHING)
        return {
            f"{name}_logits": scores,
            f"{name}_loss": loss,
            f"{name}_loss_per_sample_sum": per_token.sum(axis=1),
        }

    ids = given["decoder_ids"]
    keys_valid = jnp.concatenate([jnp.ones((ids.shape[0], q), bool), valid], axis=1)
    cached_mask = decode_mask(q + jnp.arange(t)[None], q + t) & padding_mask(keys_valid)
    unilm_mask = multimodal_causal_mask(q, valid)
    return {
        **image_only,
        **past(image_out.cache, q),
        **text_only,
        **both,
        **masked,
        **caption("itg", None, ids, mask=cached_mask, cache=image_out.cache, start=q),
        **caption("itg_unilm", images, ids, mask=unilm_mask),
        "itg_decoder_input_ids": ids,
        "itg_labels": given["labels"],
        "itg_extended_mask_cached": cached_mask,
        "itg_extended_mask_unilm": unilm_mask,
    }


def layers_of(sown: dict[str, Any]) -> list[Array]:
    """States after each layer: groups are stacked, and the tail of a depth that does not divide is not."""
    groups, tail = sown.get("layers", {}), sown.get("tail", {})
    stacked = [groups[name]["hidden"][0] for name in sorted(groups)]
    count = stacked[0].shape[0] if stacked else 0
    return [layer[group] for group in range(count) for layer in stacked] + [
        tail[name]["hidden"][0] for name in sorted(tail)
    ]


def past(kept: QformerCache, q: int) -> dict[str, Array]:
    """Keys and values of the queries in each layer, [b n q h] as PyTorch keeps them."""
    groups = kept.layers[0][0].shape[0] if kept.layers else 0
    layers = [(keys[group], values[group]) for group in range(groups) for keys, values in kept.layers]
    found = {}
    for index, (keys, values) in enumerate([*layers, *kept.tail]):
        found[f"image_only_past_{index}_k"] = keys[:, :q].transpose(0, 2, 1, 3)
        found[f"image_only_past_{index}_v"] = values[:, :q].transpose(0, 2, 1, 3)
    return found


@pytest.fixture(scope="module")
def results(converted: Callable[[Case], Converted]) -> Callable[[Case], dict[str, Any]]:
    return cache(lambda case: run(converted(case)))


@pytest.mark.parametrize(("case", "quantity"), recorded("qformer", *QFORMER))
def test_recorded(case: Case, quantity: str, results: Any, compare: Compare) -> None:
    actual, expected = results(case)[quantity], case.outputs[quantity]
    if "extended_mask" in quantity:  # additive there (0 or -10000, with an axis for heads), boolean here
        allowed = (expected == 0).squeeze(1)
        compare.equal(jnp.broadcast_to(actual, allowed.shape), allowed)
    elif expected.dtype.kind == "i":
        compare.equal(actual, expected)
    else:
        compare.close(actual, expected, *[LOSS] * ("loss" in quantity))
