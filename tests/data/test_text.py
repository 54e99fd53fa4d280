"""Tokenisers against the recorded ids and texts of the original programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mgpt4_jax.data.text import (
    StreamDecoder,
    clean_caption,
    clean_question,
    copy_tokenizer,
    load_bert_tokenizer,
    load_llama_tokenizer,
)
from mgpt4_jax.errors import UserError

MINIGPT4_CASES = ("minigpt4_vicuna", "minigpt4_llama2")


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module", params=MINIGPT4_CASES)
def case(request, golden_dir):
    folder = golden_dir / request.param
    with np.load(folder / "outputs.npz") as outputs:
        generated = {key: outputs[f"gen_{key}"] for key in read_config(folder)["generate"]}
    return read_config(folder), load_llama_tokenizer(folder / "llm"), generated


@pytest.fixture
def llama(golden_dir):
    return load_llama_tokenizer(golden_dir / "minigpt4_vicuna" / "llm")


@pytest.fixture
def llama_dir(golden_dir, tmp_path) -> Path:
    return Path(shutil.copytree(golden_dir / "minigpt4_vicuna" / "llm", tmp_path / "llm"))


def test_answers_and_end_symbols(case):
    config, tokenizer, _ = case
    for end_symbol, rows in config["answer_ids"].items():
        assert [tokenizer.encode(answer + end_symbol) for answer in config["answers"]] == rows


def test_segments_of_prompts(case):
    config, tokenizer, _ = case
    prompts = [config["stage1_prompt"], config["stage2_prompt"], *config["instr"]]
    for prompt, rows in zip(prompts, config["prompt_segments_ids"], strict=True):
        assert [tokenizer.encode(part) for part in prompt.split("<ImageHere>")] == rows
    for prompt, (rows,) in zip(config["gen_prompts"], [[r] for r in config["gen_context_segments_ids"]], strict=True):
        parts = prompt.split("<ImageHere>")
        assert [tokenizer.encode(part, add_bos=i == 0) for i, part in enumerate(parts)] == rows


def test_generated_texts(case):
    config, tokenizer, generated = case
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        config["bos"],
        config["eos"],
        config["pad_token_id"],
    )
    for turn in config["chat_turns"]:
        text = tokenizer.decode(turn["ids"]).split("###")[0].split("Assistant:")[-1]
        assert text.strip() == turn["text"]
    for name, rows in generated.items():
        assert [clean_generated(tokenizer.decode(row)) for row in rows] == config["generate"][name]["text"]


def clean_generated(text: str) -> str:
    """What ``MiniGPTBase.generate`` does to its text."""
    return text.split("</s>")[0].replace("<s>", "").split("[/INST]")[-1].strip()


def test_dummy_prefix_of_every_stretch_of_text(llama):
    a = llama.encode("a")
    assert llama.encode("</s>") == [llama.eos_id]
    assert llama.encode("a</s>a<s>a") == [*a, llama.eos_id, *a, llama.bos_id, *a]
    assert llama.encode("", add_bos=True) == [llama.bos_id]
    assert llama.encode("a", add_bos=True) == [llama.bos_id, *a]


def test_pad_token_is_an_ordinary_piece(llama, llama_dir):
    assert llama.pad_token == "$$"
    assert llama.pad_token not in llama.special_tokens
    assert llama.decode([llama.pad_id]) == ""
    assert load_llama_tokenizer(llama_dir, pad_token="no such piece").pad_id == llama.eos_id
    assert load_llama_tokenizer(llama_dir, pad_token=None).pad_id == llama.eos_id


def test_vicuna_adds_a_pad_token(llama, llama_dir):
    (llama_dir / "added_tokens.json").write_text(json.dumps({"[PAD]": llama.vocab_size}))
    (llama_dir / "special_tokens_map.json").write_text(
        '{"bos_token": "</s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "</s>"}'
    )
    vicuna = load_llama_tokenizer(llama_dir)
    assert vicuna.vocab_size == llama.vocab_size + 1
    assert vicuna.bos_id == vicuna.eos_id == llama.eos_id  # what the map says wins, odd as it is
    assert vicuna.pad_id == llama.pad_id
    a = llama.encode("a")
    assert vicuna.encode("a [PAD] a") == [*a, llama.vocab_size, *a]  # a bare string swallows the blanks around it
    assert load_llama_tokenizer(llama_dir, pad_token=None).pad_id == llama.vocab_size


def test_added_tokens_without_an_id_get_the_next(llama, llama_dir):
    (llama_dir / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<box>", "<unk>"]}')
    tokenizer = load_llama_tokenizer(llama_dir)
    assert tokenizer.encode("<box>") == [llama.vocab_size]
    assert tokenizer.vocab_size == llama.vocab_size + 1
    assert tokenizer.decode([*llama.encode("a"), llama.vocab_size]) == "a"
    assert tokenizer.decode([*llama.encode("a"), llama.vocab_size], skip_special=False) == "a <box>"


def test_added_tokens_decoder_is_read(llama, llama_dir):
    config = json.loads((llama_dir / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        str(llama.vocab_size): {"content": "[PAD]", "special": True},
        str(llama.vocab_size + 1): {"content": "<word>", "special": False},
    }
    (llama_dir / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_llama_tokenizer(llama_dir)
    a = llama.encode("a")
    ids = [*a, llama.vocab_size, llama.vocab_size + 1, *a]
    assert tokenizer.encode("a[PAD]<word>a") == ids
    assert tokenizer.decode(ids) == "a <word> a"
    assert tokenizer.decode([*ids, 10**6, -1]) == "a <word> a"


def test_empty_special_tokens_count_as_absent(llama, llama_dir):
    (llama_dir / "tokenizer_config.json").write_text('{"bos_token": "", "eos_token": "", "unk_token": ""}')
    assert load_llama_tokenizer(llama_dir).encode("<s>a", add_bos=True) == llama.encode("<s>a", add_bos=True)


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_lone_surrogates_are_refused(llama, golden_dir, text):
    for tokenizer in (llama, load_bert_tokenizer(golden_dir / "qformer" / "bert_tokenizer")):
        with pytest.raises(UserError, match="lone surrogate"):
            tokenizer.encode(text)
        with pytest.raises(UserError, match="expected text, got list"):
            tokenizer.encode(["a"])


def test_missing_and_broken_tokenizers_are_named(llama_dir, tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.model or tokenizer\.json; copy"):
        load_llama_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no vocab\.txt; put"):
        load_bert_tokenizer(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer files"):
        copy_tokenizer(tmp_path, tmp_path / "copy")
    (llama_dir / "tokenizer_config.json").write_text("<html>")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON"):
        load_llama_tokenizer(llama_dir)
    (llama_dir / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="holds list"):
        load_llama_tokenizer(llama_dir)
    (llama_dir / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_llama_tokenizer(llama_dir)
    (llama_dir / "tokenizer_config.json").unlink()
    (llama_dir / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"vocab\.txt lacks \[PAD\]"):
        load_bert_tokenizer(llama_dir)
    (llama_dir / "vocab.txt").write_bytes(b"\xff\xfe\0")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        load_bert_tokenizer(llama_dir / "vocab.txt")


def test_copied_tokenizer_is_the_same(llama, llama_dir, golden_dir, tmp_path):
    copy_tokenizer(llama_dir, tmp_path / "model" / "tokenizer")
    names = {path.name for path in (tmp_path / "model" / "tokenizer").iterdir()}
    assert names == {"tokenizer.model", "tokenizer_config.json"}  # no weights, no config of the model
    text = "A dog</s> and 3 cats."
    assert load_llama_tokenizer(tmp_path / "model" / "tokenizer").encode(text) == llama.encode(text)
    vocabulary = golden_dir / "qformer" / "bert_tokenizer" / "vocab.txt"
    copy_tokenizer(vocabulary, tmp_path / "bert")
    assert load_bert_tokenizer(tmp_path / "bert").encode("a dog") == load_bert_tokenizer(vocabulary).encode("a dog")


# --- tokenizer.json -------------------------------------------------------------------------------------------


@pytest.fixture
def llama3(tmp_path):
    """A small tokenizer.json in LLaMA-3's manner: byte-level pairs, special tokens, no dummy prefix."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate([*alphabet, "$$"])}, [("$", "$")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}')
    return tmp_path


def test_tokenizer_json_alone(llama3):
    tokenizer = load_llama_tokenizer(llama3)
    text = "Grüße 😀 <ok>"
    ids = tokenizer.encode(text, add_bos=True)
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode([*ids, tokenizer.eos_id, 10**7]) == text
    assert tokenizer.encode("<|eot_id|>") == [tokenizer.eos_id]
    assert tokenizer.special_tokens == ("<|begin_of_text|>", "<|eot_id|>")
    assert tokenizer.encode("$$") == [tokenizer.pad_id]
    assert load_llama_tokenizer(llama3, pad_token=None).pad_id == tokenizer.eos_id
    assert stream(tokenizer, ids) == text


def test_tokenizer_json_needs_its_special_tokens(llama3):
    (llama3 / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>"}')
    with pytest.raises(UserError, match="names no bos_token"):
        load_llama_tokenizer(llama3)
    (llama3 / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_llama_tokenizer(llama3)


def test_streaming_through_byte_fallback(tmp_path):
    """A tokenizer.json that judges runs of byte tokens as a whole."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4} | {f"<0x{i:02X}>": i + 5 for i in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    assert_streams(load_llama_tokenizer(tmp_path))


# --- streaming ------------------------------------------------------------------------------------------------


def stream(tokenizer, ids) -> str:
    decoder = StreamDecoder(tokenizer)
    return "".join([*(decoder.push(index) for index in ids), decoder.finish()])


def assert_streams(tokenizer) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        ids = rng.integers(0, tokenizer.vocab_size + 3, int(rng.integers(1, 200))).tolist()
        assert stream(tokenizer, ids) == tokenizer.decode(ids)


def test_streamed_text_is_the_decoded_text(case):
    _, tokenizer, generated = case
    for rows in generated.values():
        for row in rows:
            assert stream(tokenizer, row) == tokenizer.decode(row)
    assert_streams(tokenizer)


def test_half_a_character_is_never_shown(llama):
    text = "a 😀 and 文字 é"
    shown = ""
    decoder = StreamDecoder(llama)
    for index in llama.encode(text):
        shown += decoder.push(index)
        assert "\ufffd" not in shown
        assert text.startswith(shown)
    assert shown + decoder.finish() == text
    assert decoder.finish() == ""


def test_streaming_keeps_spaces_past_its_window(llama):
    text = "the dog and the cat and " * 40 + "  two  spaces"
    assert stream(llama, llama.encode(text)) == text


def test_unfinished_character_is_flushed(llama):
    ids = llama.encode("a 😀")[:-1]
    assert stream(llama, ids) == llama.decode(ids)
    assert llama.decode(ids).endswith("\ufffd")


# --- BERT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qformer", "blip2_stage1", "blip2_retrieval"])
def test_bert_ids(golden_dir, name):
    folder = golden_dir / name
    config = read_config(folder)
    tokenizer = load_bert_tokenizer(folder / "bert_tokenizer")
    with np.load(folder / "inputs.npz") as inputs:
        expected, mask = inputs["text_ids"], inputs["text_mask"]
    assert tokenizer.vocab_size == config["qformer"]["vocab_size"]
    assert tokenizer.dec_id == config["qformer"]["vocab_size_before_DEC"]
    batch = tokenizer.encode_batch(config["texts"], max_length=expected.shape[1])
    np.testing.assert_array_equal(batch.ids, expected)
    np.testing.assert_array_equal(batch.mask, mask.astype(bool))
    assert batch.ids.dtype == np.int32


def test_bert_pads_to_the_longest(golden_dir):
    folder = golden_dir / "blip2_stage1"
    texts = read_config(folder)["texts"]
    with np.load(folder / "outputs.npz") as outputs:
        width = outputs["feat_text_text_embeds"].shape[1]
    batch = load_bert_tokenizer(folder / "bert_tokenizer").encode_batch(texts, pad="longest")
    assert batch.ids.shape == (len(texts), width)


@pytest.fixture
def bert(golden_dir):
    return load_bert_tokenizer(golden_dir / "qformer" / "bert_tokenizer")


def test_bert_truncates_either_side(bert):
    whole = bert.encode("a dog and a cat")
    assert bert.encode("a dog and a cat", max_length=5) == [*whole[:4], bert.sep_id]
    assert bert.encode("a dog and a cat", max_length=5, truncate="left") == [bert.cls_id, *whole[-4:]]
    assert bert.encode("", max_length=5) == [bert.cls_id, bert.sep_id]


def test_bert_normalises(bert):
    assert bert.encode("A DÓG") == bert.encode("a dog")
    assert bert.encode("[DEC] dog") == [bert.cls_id, bert.dec_id, *bert.encode("dog")[1:]]
    assert bert.unk_id in bert.encode("文")
    assert bert.decode(bert.encode("Two cats, sitting.")) == bert.decode(bert.encode("two cats , sitting ."))


def test_bert_from_tokenizer_json(bert, golden_dir, tmp_path):
    vocabulary = (golden_dir / "qformer" / "bert_tokenizer" / "vocab.txt").read_text().split()
    tokenizer = tokenizers.BertWordPieceTokenizer({token: i for i, token in enumerate(vocabulary)})
    tokenizer.add_special_tokens(["[DEC]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_bert_tokenizer(tmp_path)
    assert loaded.dec_id == bert.dec_id
    assert loaded.vocab_size == bert.vocab_size
    assert loaded.encode("A red square, two cats") == bert.encode("A red square, two cats")


def test_a_stored_dec_token_keeps_its_id(bert, golden_dir, tmp_path):
    copy_tokenizer(golden_dir / "qformer" / "bert_tokenizer", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[DEC]": bert.dec_id}))
    assert load_bert_tokenizer(tmp_path).vocab_size == bert.vocab_size


# --- captions -------------------------------------------------------------------------------------------------


def test_captions_are_cleaned_as_the_original_cleans(golden_dir):
    recorded = json.loads((golden_dir / "preprocess" / "captions.json").read_text())
    assert [clean_caption(text) for text in recorded["inputs"]] == recorded["blip_caption"]
    for text, expected in zip(recorded["inputs"], recorded["blip_caption_prompt_max4"], strict=True):
        assert clean_caption(text, max_words=4, prompt="a photo of ") == expected


def test_questions_lose_their_punctuation():
    assert clean_question("What's in the U.S.A. map?! (left); ") == "what's in the usa map? left"
    assert clean_question("a b c d", max_words=2) == "a b"
