"""Captions of the Q-Former: step by step as in one pass, alone as in a batch, and through ``load``."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.data.text import BertTokenizer
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.captions import Captioner
from mgpt4_jax.generate.sampling import SamplingParams
from mgpt4_jax.models import build
from tests.tiny import QFORMER, VIT, random_params

VOCABULARY = {name: index for index, name in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(55))))}
READER = dataclasses.replace(QFORMER, with_text=True, with_lm_head=True, vocab_size=len(VOCABULARY) + 1, num_layers=3)
CONFIG = ModelConfig("blip2", VIT, READER)
NEW = 7


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner(CONFIG, random_params(CONFIG, scale=0.2), BertTokenizer(VOCABULARY))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(5, VIT.image_size, VIT.image_size, 3)).astype(np.float32)


def test_one_beam_takes_the_likeliest_token_of_a_whole_pass(captioner: Captioner, pixels: np.ndarray) -> None:
    model, size = build(CONFIG), NEW + 1

    def logits(module: Any, ids: Any) -> Any:
        cache = module.image_features(pixels, room=size).cache
        return module.caption_logits(cache, ids, np.ones(ids.shape, bool))

    run = jax.jit(lambda ids: model.apply({"params": captioner.params}, ids, method=logits))
    ids = np.full((len(pixels), size), captioner.tokenizer.dec_id)
    for place in range(NEW):
        ids[:, place + 1] = np.asarray(run(ids))[:, place].argmax(axis=-1)
    found = captioner.captions(pixels, SamplingParams(max_new_tokens=NEW))
    for row, [best] in zip(ids[:, 1:].tolist(), found, strict=True):
        end = row.index(captioner.tokenizer.sep_id) + 1 if captioner.tokenizer.sep_id in row else NEW
        assert best.ids == row[:end]
    assert len({tuple(best.ids) for [best] in found}) > 1


def test_a_picture_is_captioned_as_alone(captioner: Captioner, pixels: np.ndarray) -> None:
    params = SamplingParams(max_new_tokens=NEW, num_beams=4, num_return_sequences=3, length_penalty=-1.0)
    together = captioner.captions(pixels, params)
    for row, picture in enumerate(pixels):
        [alone] = captioner.captions(picture[None], params)
        assert [one.ids for one in alone] == [one.ids for one in together[row]]
        np.testing.assert_allclose([one.score for one in alone], [one.score for one in together[row]], rtol=1e-5)
    assert {len(row) for row in together} == {3}
    assert captioner.num_compiled() <= 3  # one beam; four beams of one picture and of four


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.5}, "not drawn"),
        ({"stop": ("a",)}, "stop_ids"),
        ({"max_new_tokens": 40}, "39 positions"),
        ({"num_beams": 60}, "60 tokens"),
    ],
)
def test_what_it_cannot_do_is_refused(captioner: Captioner, pixels: np.ndarray, change: dict, message: str) -> None:
    params = dataclasses.replace(SamplingParams(max_new_tokens=NEW), **change)
    with pytest.raises(UserError, match=message):
        captioner.captions(pixels, params)


def test_a_model_without_a_language_head_is_refused() -> None:
    config = ModelConfig("blip2", VIT, dataclasses.replace(READER, with_lm_head=False))
    with pytest.raises(UserError, match="no language head"):
        Captioner(config, {}, BertTokenizer(VOCABULARY))
