"""BLIP-2 stage 1 as far as the models go: features, similarities, matching, caption loss, retrieval scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, recorded
from claims import RETRIEVAL, STAGE1
from comparing import LOSS, Compare
from conversion import Converted

from mgpt4_jax.data.text import load_bert_tokenizer
from mgpt4_jax.evaluate.metrics import recalls
from mgpt4_jax.evaluate.retrieval import Retriever, best_pairs, rerank
from mgpt4_jax.losses import IGNORED, caption_loss
from mgpt4_jax.models import build
from mgpt4_jax.models.masks import bidirectional_mask, padding_mask
from mgpt4_jax.typing import Array

LABEL_SMOOTHING = 0.1  # of BLIP-2's caption loss


def run_stage1(converted: Converted) -> dict[str, Any]:
    """Every quantity by its recorded name, from two compiled programs."""
    case, model, params = converted.case, build(converted.config), converted.params
    tokenizer = load_bert_tokenizer(converted.model_dir / "qformer_tokenizer")
    padded = tokenizer.encode_batch(case.config["texts"], max_length=case.config["max_txt_len"])
    longest = tokenizer.encode_batch(case.config["texts"], pad="longest")
    ids, valid, pixels = jnp.asarray(case.inputs["text_ids"]), case.inputs["text_mask"] > 0, case.pixels()
    captions = ids.at[:, 0].set(tokenizer.dec_id)
    targets = jnp.where(ids == tokenizer.pad_id, IGNORED, captions)
    pairs = matched_pairs(case)

    @jax.jit
    def features(params: Any) -> dict[str, Array]:
        return model.apply({"params": params}, pixels, ids, valid, longest, pairs, method=stage1_features)

    @jax.jit
    @jax.value_and_grad
    def caption(params: Any) -> Array:
        logits = model.apply({"params": params}, pixels, captions, valid, method=caption_logits)
        return caption_loss(logits, targets, label_smoothing=LABEL_SMOOTHING)[0]

    loss, gradient = caption(params)
    return {
        **features(params),
        "text_ids": padded.ids,
        "text_mask": padded.mask,
        "loss_lm": loss,
        "ret_loss_lm": loss,  # the labels of retrieval change the contrast and its negatives only
        "grads_itg": converted.to_source(gradient),
        "config.temp": params["temp"],
    }


def matched_pairs(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(images, texts) of the matching batch: the pairs, a negative image for each text, a negative text for each."""
    own = np.arange(len(case.inputs["text_ids"]))
    images = np.concatenate([own, case.outputs["neg_image_idx"], own])
    return images, np.concatenate([own, own, case.outputs["neg_text_idx"]])


def stage1_features(
    model: nn.Module, pixels: Array, ids: Array, valid: Array, longest: Any, pairs: tuple[np.ndarray, np.ndarray]
) -> dict[str, Array]:
    image = model.image_features(pixels)
    text = model.text_features(ids, valid)[:, 0]
    temp = model.temp
    images, texts = pairs
    long_ids, long_valid = jnp.asarray(longest.ids), jnp.asarray(longest.mask)
    joint_mask = bidirectional_mask(model.config.qformer.num_queries, long_valid)
    return {
        "image_embeds": image.tokens,
        "query_last": image.queries,
        "image_feats": image.embeds,
        "text_cls": model.qformer(text_ids=ids, mask=padding_mask(valid)).text[:, 0],
        "text_feat": text,
        "sim_i2t": model.similarity(image.embeds, text) / temp,
        "sim_t2i": model.similarity(image.embeds, text).T / temp,
        "itm_logits": model.match_logits(image.tokens[images], ids[texts], valid[texts]),
        "compute_itm": model.match_logits(image.tokens, ids, valid)[:, 1],
        "feat_image_image_embeds": image.queries,
        "feat_image_image_embeds_proj": image.embeds,
        "feat_text_text_embeds": model.qformer(text_ids=long_ids, mask=padding_mask(long_valid)).text,
        "feat_text_text_embeds_proj": model.text_features(long_ids, long_valid),
        "feat_multimodal_multimodal_embeds": model.qformer(image.tokens, long_ids, mask=joint_mask).queries,
    }


def caption_logits(model: nn.Module, pixels: Array, ids: Array, valid: Array) -> Array:
    return model.caption_logits(model.image_features(pixels, room=ids.shape[1]).cache, ids, valid)


def run_retrieval(converted: Converted) -> dict[str, Any]:
    """As ``mgpt4 eval`` does: similarities of all pairs; the best of each row are matched and their logit is added."""
    case, config = converted.case, converted.case.config
    tokenizer = load_bert_tokenizer(converted.model_dir / "qformer_tokenizer")
    retriever = Retriever(converted.config, converted.params, tokenizer)
    features = retriever.features_of_pixels(case.pixels(), config["texts"])
    np.testing.assert_array_equal(features.ids, case.inputs["text_ids"])
    np.testing.assert_array_equal(features.valid, case.inputs["text_mask"])
    pairs = best_pairs(features.similarity, config["k_test"])
    scores = rerank(features.similarity, pairs, retriever.match(features, pairs), config["k_test"])
    texts_of = [config["img2txt"][str(image)] for image in range(len(scores[0]))]
    image_of = [config["txt2img"][str(text)] for text in range(len(scores[1]))]
    metrics = recalls(*scores, texts_of, image_of)
    return {"score_i2t": scores[0], "score_t2i": scores[1], "config.metrics": metrics}


@pytest.fixture(scope="module")
def stage1(converted: Callable[[Case], Converted]) -> Callable[[Case], dict[str, Any]]:
    return cache(lambda case: run_stage1(converted(case)))


@pytest.fixture(scope="module")
def retrieval(converted: Callable[[Case], Converted]) -> Callable[[Case], dict[str, Any]]:
    return cache(lambda case: run_retrieval(converted(case)))


@pytest.mark.parametrize(("case", "quantity"), recorded("blip2_stage1", *STAGE1))
def test_stage1(case: Case, quantity: str, stage1: Any, compare: Compare) -> None:
    actual = stage1(case)[quantity]
    if quantity.startswith("grads"):
        compare.gradients(actual, case.tensors(quantity))
    elif quantity.startswith("config."):
        compare.close(actual, case.config[quantity.removeprefix("config.")], LOSS)
    elif quantity in ("text_ids", "text_mask"):
        compare.equal(actual, case.outputs[quantity])
    else:
        compare.close(actual, case.outputs[quantity], *[LOSS] * ("loss" in quantity))


@pytest.mark.parametrize(("case", "quantity"), recorded("blip2_retrieval", *RETRIEVAL))
def test_retrieval(case: Case, quantity: str, retrieval: Any, compare: Compare) -> None:
    actual = retrieval(case)[quantity]
    if quantity == "config.metrics":
        assert actual == pytest.approx(case.config["metrics"], rel=1e-12)
    else:
        compare.close(actual, case.outputs[quantity])
