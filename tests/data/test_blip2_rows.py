"""Rows of BLIP-2 stage 2, from tokens to padded batches."""

from __future__ import annotations

import numpy as np
import pytest
from train.instruct_world import rows_of

from mgpt4_jax.config import IGNORED
from mgpt4_jax.data.batching import pad_sequences
from mgpt4_jax.data.blip2_rows import (
    behind_pictures,
    instruct_sequence,
    opt_sequence,
    pad_prefix_sequences,
    t5_sequence,
)
from mgpt4_jax.data.generative_rows import GenerativeRows
from mgpt4_jax.data.loading import extra_arrays
from mgpt4_jax.data.samples import Sample
from mgpt4_jax.data.text import load_llama_tokenizer
from mgpt4_jax.data.text_lm import load_opt_tokenizer, load_t5_tokenizer
from mgpt4_jax.errors import UserError
from mgpt4_jax.train_config import TextConfig

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


def test_instructblip_on_a_llama_cuts_the_question_on_the_left_and_the_answer_on_the_right(golden_dir):
    """LAVIS ``concat_text_input_output``: the answer's own beginning of sequence counts, and is not read."""
    llama = load_llama_tokenizer(golden_dir / "minigpt4_vicuna" / "llm", pad_token=None)
    row = instruct_sequence(llama, "what is it?", "a dog", tokens_per_image=Q)
    asked, said = llama.encode("what is it?"), llama.encode("a dog</s>")
    assert said[-1] == llama.eos_id
    assert row.ids.tolist() == [0, 0, 0, llama.bos_id, *asked, *said]
    assert row.slots.tolist() == [0, 1, 2] + [-1] * (1 + len(asked) + len(said))
    assert row.targets.tolist() == [IGNORED] * (Q + 1 + len(asked)) + said
    cut = instruct_sequence(llama, "what is it?", "a dog", tokens_per_image=Q, max_prompt_length=3, max_text_length=3)
    assert cut.ids.tolist() == [0, 0, 0, llama.bos_id, *asked[-2:], *said[:2]]
    with pytest.raises(UserError, match="max_text_length 1 leaves nothing to predict"):
        instruct_sequence(llama, "what?", "a dog", tokens_per_image=Q, max_text_length=1)


def test_instructblip_on_t5_cuts_the_question_on_the_left(t5):
    row = t5_sequence(t5, "a red square", "the", tokens_per_image=Q, max_text_length=9, max_prompt_length=3)
    assert row.ids.tolist() == [0, 0, 0, *t5.encode("a red square")[-2:], 1]


def test_the_q_former_of_an_instructblip_reads_the_end_of_the_instruction():
    rows = rows_of("llama", max_prompt_length=6)
    row = rows.row(Sample("x", b"", "a dog", "what is the colour of it?"))
    bert = rows.qformer_tokenizer
    whole = bert.encode("what is the colour of it?")
    assert row.qformer_ids.tolist() == [bert.cls_id, *whole[-5:-1], bert.sep_id]
    empty = rows.row(Sample("x", b"", "a dog"))
    batch = extra_arrays([row, empty, rows.filling_row()], rows.text)
    assert batch["qformer_ids"].shape == (3, 6)
    assert batch["qformer_mask"].sum(1).tolist() == [6, 2, 2]
    assert {name: (array.shape[1:], str(array.dtype)) for name, array in batch.items()} == rows.extras
    assert (batch["qformer_ids"][1] == [bert.cls_id, bert.sep_id, 0, 0, 0, 0]).all()


def test_a_template_takes_the_question_of_the_sample():
    rows, question = rows_of("t5", max_prompt_length=64), Sample("x", b"", "red", "what colour?")
    wrapped = rows.row(question, "Question: {} Short answer:")
    plain = rows.row(Sample("x", b"", "red", "Question: what colour? Short answer:"))
    assert wrapped.ids.tolist() == plain.ids.tolist()
    assert wrapped.qformer_ids.tolist() == plain.qformer_ids.tolist()
    assert rows.row(question, "describe it").ids.tolist() == rows.row(question).ids.tolist()
    with pytest.raises(UserError, match=r"has no instruction that would go into 'Question: \{\}' of text.instr"):
        rows.row(Sample("x", b"", "red"), "Question: {}")


def test_opt_reads_a_blank_between_a_prompt_and_what_follows(opt, golden_dir):
    """As LAVIS fine-tunes on captions: their prompt ends with the blank that OPT's next piece begins with."""
    rows = GenerativeRows(golden_dir / "blip2_opt" / "opt_tokenizer", TextConfig(), Q, False)
    expected = opt_sequence(opt, "a photo of a dog", prompt="a photo of", tokens_per_image=Q)
    for prompt in ("a photo of", "a photo of "):
        row = rows.row(Sample("x", b"", "a dog"), prompt)
        assert row.ids.tolist() == expected.ids.tolist() and row.targets.tolist() == expected.targets.tolist()
