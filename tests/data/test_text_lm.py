"""Tokenisers of OPT and T5: ids of the originals', of ``transformers``' and of slow ones written out here."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import regex
import sentencepiece
from transformers import GPT2Tokenizer, T5TokenizerFast

from mgpt4_jax.data.text import StreamDecoder
from mgpt4_jax.data.text_lm import clean_up, load_opt_tokenizer, load_t5_tokenizer
from mgpt4_jax.errors import UserError

TEXTS = (
    "a photo of a red square and a blue circle.\n",
    "",
    " two  blanks,  and\ttabs \n\n at the end  ",
    "It's what they'll say: don't, we've, I'M 12345 times!",
    "naïve café — 東京 🦜🦜 e\u0301 \u00a0 ﬁne",
    "Question: what is on the table? Short answer:",
)


@pytest.fixture(scope="module")
def opt_dir(golden_dir):
    return golden_dir / "blip2_opt" / "opt_tokenizer"


@pytest.fixture(scope="module")
def t5_dir(golden_dir):
    return golden_dir / "blip2_t5" / "t5_tokenizer"


@pytest.fixture
def pieces_dir(t5_dir, tmp_path):
    """T5's without ``tokenizer.json``."""
    folder = tmp_path / "pieces"
    folder.mkdir()
    for name in ("spiece.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(t5_dir / name, folder / name)
    return folder


def slow_byte_level_bpe(folder, text):
    """GPT-2's, merge by merge: what ``use_fast=False`` ran."""
    words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(line for line in lines[1:] if line)}
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    letters = {byte: chr(byte) for byte in kept} | {byte: chr(256 + place) for place, byte in enumerate(moved)}
    ids = []
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for word in regex.findall(pattern, text):
        parts = [letters[byte] for byte in word.encode()]
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
            first, second = min(pairs, key=ranks.__getitem__)
            merged, at = [], 0
            while at < len(parts):
                is_pair = parts[at : at + 2] == [first, second]
                merged.append(first + second if is_pair else parts[at])
                at += 1 + is_pair
            parts = merged
        ids += [words[part] for part in parts]
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_opt_is_the_slow_tokeniser(opt_dir, text):
    tokenizer = load_opt_tokenizer(opt_dir)
    assert tokenizer.encode(text) == slow_byte_level_bpe(opt_dir, text)
    assert tokenizer.encode_whole(text) == GPT2Tokenizer.from_pretrained(opt_dir)(text).input_ids


def test_opt_by_its_specials(opt_dir):
    tokenizer = load_opt_tokenizer(opt_dir)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 2, 1)
    assert tokenizer.encode("a", add_bos=True) == tokenizer.encode_whole("a")
    assert tokenizer.encode("a</s>b") == [*tokenizer.encode("a"), 2, *tokenizer.encode("b")]
    assert tokenizer.decode([2, *tokenizer.encode("a dog\n"), 1, 1, 10**6]) == "a dog\n"
    assert tokenizer.decode([2, *tokenizer.encode("a"), 2], skip_special=False) == "</s>a</s>"


def test_a_token_that_was_added_keeps_its_id(opt_dir, tmp_path):
    """As ``<image>`` in Hugging Face's BLIP-2."""
    folder = shutil.copytree(opt_dir, tmp_path / "opt")
    size = load_opt_tokenizer(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": size}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<image>"]}))
    tokenizer = load_opt_tokenizer(folder)
    assert tokenizer.encode("<image> a") == [size, *tokenizer.encode(" a")]
    assert tokenizer.vocab_size == size + 1


@pytest.mark.parametrize("text", TEXTS)
def test_t5_reads_both_its_files_alike(t5_dir, pieces_dir, text):
    fast, slow = load_t5_tokenizer(t5_dir), load_t5_tokenizer(pieces_dir)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(t5_dir / "spiece.model"))
    assert slow.encode(text) == pieces.encode(text)
    plain = " ".join(text.split())  # only blanks at an end or in a row are read otherwise by the two
    ids = fast.encode_whole(plain)
    assert ids == slow.encode_whole(plain)
    assert ids == T5TokenizerFast.from_pretrained(t5_dir)(plain).input_ids
    assert fast.decode(ids) == slow.decode(ids)


def test_t5_by_its_specials(t5_dir, pieces_dir):
    for tokenizer in (load_t5_tokenizer(t5_dir), load_t5_tokenizer(pieces_dir)):
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 0)
        first = tokenizer.vocab_size - 1
        assert tokenizer.encode("<extra_id_0><extra_id_99>") == [first, first - 99]
        assert tokenizer.decode([0, *tokenizer.encode_whole("a dog"), 0, first]) == "a dog"
        assert tokenizer.encode("a</s>")[-1] == 1


@pytest.mark.parametrize("load", [load_opt_tokenizer, load_t5_tokenizer])
def test_batches(load, opt_dir, t5_dir):
    tokenizer = load(opt_dir if load is load_opt_tokenizer else t5_dir)
    long = TEXTS[0]
    ids, whole = tokenizer.encode(long), tokenizer.encode_whole(long)
    before, behind = whole[: whole.index(ids[0])], whole[len(whole) - (len(whole) - len(ids)) :]
    behind = [] if before else behind
    assert tokenizer.encode_whole(long, max_length=5) == [*before, *ids[:4], *behind]
    assert tokenizer.encode_whole(long, max_length=5, truncate="left") == [*before, *ids[-4:], *behind]
    assert tokenizer.encode_whole(long, max_length=1) == [*before, *behind]
    right = tokenizer.encode_batch([long, "a"], max_length=7)
    left = tokenizer.encode_batch([long, "a"], max_length=7, pad="left")
    assert right.ids.shape == left.ids.shape == (2, 7)
    short = tokenizer.encode_whole("a")
    assert right.ids[1].tolist() == short + [tokenizer.pad_id] * (7 - len(short))
    assert left.ids[1].tolist() == [tokenizer.pad_id] * (7 - len(short)) + short
    np.testing.assert_array_equal(right.mask[1], left.mask[1][::-1])
    assert right.mask[0].all()
    assert tokenizer.encode_batch([]).ids.shape == (0, 0)


def test_texts_are_cleaned_as_transformers_4_did():
    text = "it 's here , is n't it ? yes ! ' quoted ' we 've , I 'm , they 're ."
    assert clean_up(text) == "it's here, isn't it? yes!'quoted'we've, I'm, they're."


def test_cleaning_can_be_off(opt_dir, tmp_path):
    folder = shutil.copytree(opt_dir, tmp_path / "opt")
    config = folder / "tokenizer_config.json"
    ids = load_opt_tokenizer(folder).encode("a dog .")
    assert load_opt_tokenizer(folder).decode(ids) == "a dog."
    config.write_text(json.dumps(json.loads(config.read_text()) | {"clean_up_tokenization_spaces": False}))
    assert load_opt_tokenizer(folder).decode(ids) == "a dog ."


def test_streams_join_to_the_whole_text(opt_dir, t5_dir):
    for tokenizer in (load_opt_tokenizer(opt_dir), load_t5_tokenizer(t5_dir)):
        for text in ("a red 🦜 and 東京\n", "two cats, sitting"):
            ids, stream = tokenizer.encode_whole(text), StreamDecoder(tokenizer)
            assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


def test_directories_without_their_files(tmp_path, opt_dir):
    with pytest.raises(UserError, match=r"has no merges.txt or tokenizer.json; copy the tokenizer files of OPT"):
        load_opt_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"has no tokenizer.json or spiece.model; copy the tokenizer files of T5"):
        load_t5_tokenizer(tmp_path)
    folder = shutil.copytree(opt_dir, tmp_path / "opt")
    (folder / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(UserError, match=r"merges.txt: 'a b c' is no pair of pieces"):
        load_opt_tokenizer(folder)
    (folder / "merges.txt").write_text("#version: 0.2\nqq zz\n")
    with pytest.raises(UserError, match="do not belong together"):
        load_opt_tokenizer(folder)
    (tmp_path / "spiece.model").write_text("<html>")
    with pytest.raises(UserError, match="spiece.model is not a SentencePiece model"):
        load_t5_tokenizer(tmp_path)
