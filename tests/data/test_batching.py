"""Training sequences against what the original programs fed to their language models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mgpt4_jax.convert.readers import open_source
from mgpt4_jax.data.batching import (
    IGNORED,
    bucket_for,
    conversation_sequence,
    pad_prompts,
    pad_sequences,
    training_sequence,
    wrap_instruction,
)
from mgpt4_jax.data.prompts import LLAMA2, MINIGPT_V2, VICUNA_V0, build_prompt
from mgpt4_jax.data.text import load_llama_tokenizer
from mgpt4_jax.errors import UserError

TEMPLATES = {"minigpt4_vicuna": VICUNA_V0, "minigpt4_llama2": LLAMA2}


class Case:
    """One recorded model: its texts, its tokeniser, what it was fed."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.tokenizer = load_llama_tokenizer(folder / "llm")
        with np.load(folder / "outputs.npz") as file:
            self.outputs = dict(file)
        self.table = open_source(folder / "llm").read("model.embed_tokens.weight")
        self.pictures = self.outputs.get("img_embeds")

    def tokens_per_image(self) -> int:
        if self.pictures is not None:
            return self.pictures.shape[1]
        patches = (self.config["image_size"] // self.config["vit"]["patch_size"]) ** 2
        return patches // 4  # MiniGPT-v2 joins four patches

    def compare(self, name: str, rows: list) -> None:
        """Ids (through the embeddings), slots, mask and targets of a padded batch equal the recorded ones."""
        targets = self.outputs[f"{name}_targets"]
        embeds = self.outputs[f"{name}_inputs_embeds"]
        batch = pad_sequences(rows, targets.shape[1], pad_id=self.tokenizer.pad_id)
        np.testing.assert_array_equal(batch.targets, targets)
        np.testing.assert_array_equal(batch.mask, self.outputs[f"{name}_attention_mask"].astype(bool))
        is_text = batch.slots < 0
        np.testing.assert_array_equal(self.table[batch.ids][is_text], embeds[is_text])
        if self.pictures is not None:
            for row, slots in enumerate(batch.slots):
                here = slots >= 0
                np.testing.assert_allclose(self.pictures[row][slots[here]], embeds[row][here], rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def case(request, golden_dir):
    found = Case(golden_dir / request.param)
    found.template = TEMPLATES[request.param]
    return found


@pytest.fixture(scope="module")
def v2(golden_dir):
    return Case(golden_dir / "minigptv2")


def rows_of(case: Case, conditions: list, *, end_symbol: str, max_text_length: int) -> list:
    return [
        training_sequence(
            case.tokenizer,
            condition,
            answer,
            end_symbol=end_symbol,
            max_text_length=max_text_length,
            tokens_per_image=case.tokens_per_image(),
        )
        for condition, answer in zip(conditions, case.config["answers"], strict=True)
    ]


@pytest.mark.parametrize(("name", "limit"), [("stage1_noprompt", 32), ("stage1_trunc5", 5)])
def test_stage_1_has_the_pictures_alone(case, name, limit):
    conditions = [None] * len(case.config["answers"])
    case.compare(name, rows_of(case, conditions, end_symbol="\n", max_text_length=limit))


def test_stage_1_with_a_prompt(case):
    conditions = [case.config["stage1_prompt"]] * len(case.config["answers"])
    case.compare("stage1_prompt", rows_of(case, conditions, end_symbol="\n", max_text_length=32))


def test_stage_2(case):
    end_symbol = case.config["end_sym_stage2"]
    conditions = [case.config["stage2_prompt"]] * len(case.config["answers"])
    case.compare("stage2", rows_of(case, conditions, end_symbol=end_symbol, max_text_length=160))
    assert end_symbol == case.template.end_symbol


def test_an_instruction_a_sample(case):
    conditions = case.config["instr"]
    case.compare("instr", rows_of(case, conditions, end_symbol=case.config["end_sym_stage2"], max_text_length=160))


def test_templates_wrap_as_the_original_did(case, v2):
    assert case.template.training == case.config["template"]
    assert MINIGPT_V2.training == v2.config["prompt_template"]
    assert wrap_instruction(case.template, "{what} is {}?") == case.config["template"].replace("{}", "{what} is {}?")


def test_minigpt_v2_conversations(v2):
    config = v2.config
    rows = [
        conversation_sequence(
            v2.tokenizer,
            questions.split(config["connect_sym"]),
            answers.split(config["connect_sym"]),
            template=MINIGPT_V2,
            end_symbol=config["end_sym"],
            max_text_length=config["max_txt_len"],
            tokens_per_image=v2.tokens_per_image(),
        )
        for questions, answers in zip(config["conv_q"], config["conv_a"], strict=True)
    ]
    v2.compare("conv", rows)


@pytest.mark.parametrize(("name", "num_images"), [("instr", 1), ("nlp", 0)])
def test_minigpt_v2_instructions(v2, name, num_images):
    config = v2.config
    rows = [
        training_sequence(
            v2.tokenizer,
            wrap_instruction(MINIGPT_V2, instruction),
            answer,
            end_symbol=config["end_sym"],
            max_text_length=config["max_txt_len"],
            tokens_per_image=v2.tokens_per_image(),
            num_images=num_images,
        )
        for instruction, answer in zip(config[name], config["answers"], strict=True)
    ]
    v2.compare(name, rows)


# --- the rules one by one -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(golden_dir):
    return load_llama_tokenizer(golden_dir / "minigpt4_vicuna" / "llm")


def sample(tokenizer, condition=None, answer="a dog", **fields):
    fields = {"end_symbol": "\n", "max_text_length": 32, "tokens_per_image": 3} | fields
    return training_sequence(tokenizer, condition, answer, **fields)


def test_layout_of_one_sample(tokenizer):
    row = sample(tokenizer)
    answer = tokenizer.encode("a dog\n")
    assert row.ids.tolist() == [tokenizer.bos_id, *[tokenizer.pad_id] * 3, *answer]
    assert row.slots.tolist() == [-1, 0, 1, 2, *[-1] * len(answer)]
    assert row.targets.tolist() == [IGNORED] * 4 + answer
    assert row.mask.all()
    assert {field.dtype for field in (row.ids, row.slots, row.targets)} == {np.dtype(np.int32)}


def test_several_pictures(tokenizer):
    row = sample(tokenizer, "a <ImageHere> b <ImageHere>", num_images=2)
    assert row.slots[row.slots >= 0].tolist() == list(range(6))


def test_long_answers_lose_their_end_symbol(tokenizer):
    row = sample(tokenizer, answer="a dog and a cat", end_symbol="</s>", max_text_length=2)
    assert row.targets[row.targets != IGNORED].tolist() == tokenizer.encode("a dog and a cat")[:2]


def test_long_conditions_lose_their_end(tokenizer):
    row = sample(tokenizer, "<ImageHere> a dog", max_context_length=2)
    assert row.slots.tolist()[:3] == [-1, 0, 1]
    assert row.targets[3] == tokenizer.encode("a dog\n")[0]


def add_pad_token(folder: Path, target: Path):
    """A tokeniser whose pad token can be written in a caption."""
    shutil.copytree(folder, target)
    (target / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    return load_llama_tokenizer(target, pad_token=None)


def test_a_written_pad_token_is_not_predicted(golden_dir, tmp_path):
    tokenizer = add_pad_token(golden_dir / "minigpt4_vicuna" / "llm", tmp_path / "llm")
    pad = tokenizer.pad_id
    row = sample(tokenizer, answer="a [PAD] dog")
    here = np.flatnonzero((row.ids == pad) & (row.slots < 0))
    assert len(here) == 1
    assert (row.targets[here] == IGNORED).all()
    assert row.mask[here].all()
    fields = {"template": MINIGPT_V2, "end_symbol": "\n", "max_text_length": 32, "tokens_per_image": 3}
    talk = conversation_sequence(tokenizer, ["<ImageHere>"], ["a [PAD] dog"], **fields)
    here = np.flatnonzero((talk.ids == pad) & (talk.slots < 0))
    assert (talk.targets[here] == pad).all()  # upstream predicts it here, and hides it instead
    assert not talk.mask[here].any()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"answer": ["a"]}, "must be text, got list"),
        ({"answer": None}, "must be text, got NoneType"),
        ({"answer": "a\ud800"}, "lone surrogate"),
        ({"answer": "", "end_symbol": ""}, "nothing to predict"),
        ({"max_text_length": 0}, "nothing to predict"),
        ({"condition": "no picture here"}, "has 0 <ImageHere> but 1 picture;"),
        ({"condition": "<ImageHere><ImageHere>"}, "has 2 <ImageHere> but 1 picture;"),
        ({"condition": "<ImageHere>", "num_images": 0}, "has 1 <ImageHere> but no pictures;"),
        ({"tokens_per_image": 0}, "reads no pictures"),
    ],
)
def test_bad_samples_are_refused(tokenizer, fields, reason):
    with pytest.raises(UserError, match=reason):
        sample(tokenizer, **fields)


@pytest.mark.parametrize(("questions", "answers"), [([], []), (["<ImageHere>"], []), (["<ImageHere>"], ["a", "b"])])
def test_uneven_conversations_are_refused(tokenizer, questions, answers):
    fields = {"template": MINIGPT_V2, "end_symbol": "\n", "max_text_length": 32, "tokens_per_image": 3}
    with pytest.raises(UserError, match="as many answers as questions"):
        conversation_sequence(tokenizer, questions, answers, **fields)


def test_batches_have_one_shape(tokenizer):
    rows = [sample(tokenizer), sample(tokenizer, answer="two cats and a house")]
    batch = pad_sequences(rows, 24, pad_id=tokenizer.pad_id, batch_size=3)
    assert {field.shape for field in (batch.ids, batch.slots, batch.mask, batch.targets)} == {(3, 24)}
    assert batch.ids[0, : len(rows[0])].tolist() == rows[0].ids.tolist()
    assert (batch.ids[0, len(rows[0]) :] == tokenizer.pad_id).all()
    assert not batch.mask[2].any()
    assert (batch.targets[2] == IGNORED).all()
    assert (batch.slots[2] == -1).all()


def test_prompts_are_padded_on_the_left(tokenizer):
    prompts = [
        build_prompt(tokenizer, text, num_images=1, tokens_per_image=3) for text in ("<ImageHere>", "a <ImageHere> dog")
    ]
    batch = pad_prompts(prompts, 16, pad_id=tokenizer.pad_id, batch_size=2)
    for i, prompt in enumerate(prompts):
        start = 16 - len(prompt)
        assert batch.ids[i, start:].tolist() == prompt.ids.tolist()
        assert batch.slots[i, start:].tolist() == prompt.slots.tolist()
        assert batch.mask[i].tolist() == [False] * start + [True] * len(prompt)


def test_what_does_not_fit_is_refused(tokenizer):
    rows = [sample(tokenizer)] * 2
    with pytest.raises(UserError, match=f"a sequence has {len(rows[0])} tokens, but the batch holds 4"):
        pad_sequences(rows, 4, pad_id=0)
    with pytest.raises(UserError, match="2 sequences do not fit a batch of 1"):
        pad_sequences(rows, 64, pad_id=0, batch_size=1)


def test_buckets():
    assert [bucket_for(length, (128, 64, 256)) for length in (1, 64, 65, 256)] == [64, 64, 128, 256]
    with pytest.raises(UserError, match="a sequence has 257 tokens but the longest bucket is 256"):
        bucket_for(257, (64, 256))
