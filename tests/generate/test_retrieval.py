"""BLIP-2 retrieval through ``load``, and pictures that are read with an instruction."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mgpt4_jax.api import RetrievalModel, load
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.convert.convert import convert
from mgpt4_jax.data.images import eval_transform, load_image
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.vision import ImageEncoder
from mgpt4_jax.models import build
from tests.generate.conftest import GOLDEN
from tests.tiny import LLAMA, QFORMER, VIT, random_params

TEXTS = ["a cat", "the dog runs on a beach with a ball", "two"]


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> RetrievalModel:
    case, out = GOLDEN / "blip2_stage1", tmp_path_factory.mktemp("blip2") / "model"
    config = json.loads((case / "config.json").read_text())
    heads = {"num_heads": config["qformer"]["num_attention_heads"]}
    vit = {"num_heads": config["vit"]["num_heads"], "num_layers": config["vit"]["depth"]}
    overrides = {"vit": {**vit, "image_size": config["image_size"]}, "qformer": heads}
    tokenizer = case / "bert_tokenizer"
    convert(qformer=case / "blip2_stage1.pth", overrides=overrides, qformer_tokenizer=tokenizer, out=out)
    model = load(out)
    assert isinstance(model, RetrievalModel)
    return model


def test_embeddings_and_matches_equal_the_module(retrieval: RetrievalModel, pictures: list[Path]) -> None:
    module, variables = build(retrieval.config), {"params": retrieval.params}
    pixels = np.stack([eval_transform(load_image(path), retrieval.config.vit.image_size) for path in pictures])
    images, texts = retrieval.embed_images(pictures), retrieval.embed_texts(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(images, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=-1), 1, rtol=1e-5)
    features = module.apply(variables, pixels, method="image_features")
    np.testing.assert_allclose(images, features.embeds, rtol=1e-5, atol=1e-5)
    matches = retrieval.match(pictures * 3, TEXTS)  # 27 pairs: more than one program's rows
    assert matches.shape == (9, 3)
    np.testing.assert_allclose(matches[:3], matches[6:], rtol=1e-5)
    for row, text in enumerate(TEXTS):
        batch = retrieval.tokenizer.encode_batch([text])  # as long as it is: padding must not count
        ids, valid = batch.ids, batch.mask
        alone = module.apply(variables, ids, valid, method="text_features")[0, 0]
        np.testing.assert_allclose(texts[row], alone, rtol=1e-5, atol=1e-5)
        logits = module.apply(variables, features.tokens[1:2], ids, valid, method="match_logits")
        np.testing.assert_allclose(matches[1, row], jax.nn.softmax(logits)[0, 1], rtol=1e-4, atol=1e-5)


def test_captions(retrieval: RetrievalModel, pictures: list[Path]) -> None:
    first, second, third = retrieval.caption(pictures, max_new_tokens=12, num_return_sequences=2)
    assert all(9 <= answer.new_tokens <= 12 and answer.text for answer in (first, second, third))
    assert len(first.others) == 1 and first.score > first.others[0].score
    assert first.text == retrieval.tokenizer.decode(first.ids)
    [alone] = retrieval.caption(pictures[:1], max_new_tokens=12)
    assert (alone.text, alone.others) == (first.text, ())


def test_nothing_to_embed_is_refused(retrieval: RetrievalModel) -> None:
    with pytest.raises(UserError, match="list of one text"):
        retrieval.embed_texts("a cat")
    with pytest.raises(UserError, match="no pictures"):
        retrieval.embed_images([])


def test_an_instruction_is_part_of_the_picture() -> None:
    """InstructBLIP: the Q-Former reads the text, whose padding counts for nothing."""
    qformer = dataclasses.replace(QFORMER, with_text=True)
    config = ModelConfig("instructblip", VIT, qformer, LLAMA)
    params = {name: part for name, part in random_params(config, scale=0.3).items() if name != "llama"}
    encoder = ImageEncoder(config, params, np.float32)
    assert encoder.reads_text and encoder.text_lengths == [32, 40]
    pixels = list(np.random.default_rng(0).standard_normal((3, 28, 28, 3)).astype(np.float32))
    texts = [[5, 6, 7], [5, 6, 8], list(range(39))]
    tokens = encoder.encode(pixels, texts)
    for picture, text, found in zip(pixels, texts, tokens, strict=True):
        ids = np.array([text])
        alone = build(config).apply({"params": params}, picture[None], ids, ids >= 0, method="encode_image")[0]
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4)
    [other] = encoder.encode(pixels[:1], texts[1:2])
    assert np.abs(other - tokens[0]).max() > 1e-4
