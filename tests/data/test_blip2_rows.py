"""Rows of BLIP-2 stage 2, from tokens to padded batches."""

from __future__ import annotations

import numpy as np
import pytest

from mgpt4_jax.config import IGNORED
from mgpt4_jax.data.batching import pad_sequences
from mgpt4_jax.data.blip2_rows import behind_pictures, opt_sequence, pad_prefix_sequences, t5_sequence
from mgpt4_jax.data.text_lm import load_opt_tokenizer, load_t5_tokenizer
from mgpt4_jax.errors import UserError

Q = 3


@pytest.fixture(scope="module")
def opt(golden_dir):
    return load_opt_tokenizer(golden_dir / "blip2_opt" / "opt_tokenizer")


@pytest.fixture(scope="module")
def t5(golden_dir):
    return load_t5_tokenizer(golden_dir / "blip2_t5" / "t5_tokenizer")


def test_opt_predicts_all_of_a_caption(opt):
    row = opt_sequence(opt, "a dog", tokens_per_image=Q)
    text = [2, *opt.encode("a dog\n")]
    assert row.ids.tolist() == [0, 0, 0, *text]
    assert row.slots.tolist() == [0, 1, 2] + [-1] * len(text)
    assert row.targets.tolist() == [IGNORED] * Q + text
    assert row.mask.all()


def test_opt_predicts_what_follows_its_prompt(opt):
    row = opt_sequence(opt, "a photo of a dog", prompt="a photo of", tokens_per_image=Q)
    count = len(opt.encode_whole("a photo of"))
    assert (row.targets[: Q + count] == IGNORED).all()
    assert opt.decode(row.targets[Q + count :]) == " a dog\n"


def test_a_long_caption_loses_its_end_symbol(opt):
    row = opt_sequence(opt, "a red square and a blue circle", tokens_per_image=Q, max_text_length=6)
    assert len(row) == Q + 6
    assert not opt.decode(row.targets[Q:]).endswith("\n")
    with pytest.raises(UserError, match="'a photo of a' leaves nothing of 4 tokens to predict"):
        opt_sequence(opt, "a photo of a dog", prompt="a photo of a", tokens_per_image=Q, max_text_length=4)


def test_a_literal_pad_token_is_read_but_not_predicted(opt, t5):
    row = opt_sequence(opt, "a<pad>dog", tokens_per_image=Q)
    assert row.targets[row.ids == 1].tolist() == [IGNORED]
    assert (row.targets[Q:] != IGNORED).sum() == len(row) - Q - 1
    row = t5_sequence(t5, "", "a<pad>dog", tokens_per_image=Q)
    assert (row.targets == IGNORED).sum() == 1


def test_rows_of_opt_pad_as_others(opt):
    rows = [opt_sequence(opt, text, tokens_per_image=Q) for text in ("a dog", "a red square")]
    batch = pad_sequences(rows, 20, pad_id=opt.pad_id, batch_size=3)
    assert batch.ids.shape == (3, 20)
    assert (batch.targets[~batch.mask] == IGNORED).all()


def test_t5_ends_both_sides(t5):
    row = t5_sequence(t5, "a red", "square.", tokens_per_image=Q)
    assert row.ids.tolist() == [0, 0, 0, *t5.encode("a red"), 1]
    assert row.targets.tolist() == [*t5.encode("square."), 1]
    long = t5_sequence(t5, "a red square and", "a red square and", tokens_per_image=Q, max_text_length=3)
    assert (len(long), len(long.targets)) == (Q + 3, 3)
    assert long.ids[-1] == long.targets[-1] == 1


def test_batches_of_t5_pad_both_sides(t5):
    pairs = (("a red", "square and a blue circle."), ("", "the"))
    rows = [t5_sequence(t5, *pair, tokens_per_image=Q) for pair in pairs]
    batch = pad_prefix_sequences(rows, 9, 14, pad_id=t5.pad_id, batch_size=3)
    assert batch.mask.sum(1).tolist() == [len(rows[0]), len(rows[1]), 1]
    assert batch.decoder_mask.sum(1).tolist() == [len(rows[0].targets), len(rows[1].targets), 0]
    assert (batch.targets[~batch.decoder_mask] == IGNORED).all()
    assert (batch.ids[~batch.mask] == t5.pad_id).all()
    for fields in ({"length": 5}, {"answer_length": 2}, {"batch_size": 1}):
        sizes = {"length": 9, "answer_length": 14, **fields}
        with pytest.raises(UserError, match="2 rows of up to 6 and"):
            pad_prefix_sequences(rows, pad_id=t5.pad_id, **sizes)


def test_prompts_stand_behind_the_picture_wherever_they_are_padded(opt, t5):
    left = behind_pictures(opt.encode_batch(["a dog", "a"], pad="left"), Q)
    assert left.mask[1].tolist() == [True] * Q + [False] + [True] * 2
    assert left.slots[1].tolist() == [0, 1, 2, -1, -1, -1]
    right = behind_pictures(t5.encode_batch(["a dog", "a"]), Q)
    assert right.mask[1, :Q].all()
    assert not right.mask[1, -1]
    assert np.array_equal(left.targets, np.full(left.ids.shape, IGNORED))
