"""Questions to requests, ids to text, streaming, chat, and what ``load`` gives."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mgpt4_jax.api import Model, load, make_plan
from mgpt4_jax.checkpoint import read_manifest
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.answer import AnswerText
from mgpt4_jax.sharding import make_mesh


class Letters:
    """A tokeniser of single characters."""

    vocab_size, hidden_ids, unstable_ids = 128, frozenset({2}), frozenset()

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return "".join(map(chr, ids))


def ids_of(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_text_ends_before_the_first_stop(size: int) -> None:
    answer, ids = AnswerText(Letters(), ("END", "###")), ids_of("one two ENDthree###")
    chunks = [ids[i : i + size] for i in range(0, len(ids), size)]
    assert any(answer.push(chunk) for chunk in chunks)
    assert answer.finish() == "one two "
    assert answer.ids == ids_of("one two END")


def test_a_piece_that_may_begin_a_stop_waits() -> None:
    answer = AnswerText(Letters(), ("###",))
    pieces = []
    for letter in "a#b##c##":
        answer.push(ids_of(letter))
        pieces.append(answer.take())
    assert pieces == ["a", "", "#b", "", "", "##c", "", ""]
    answer.finish()
    assert answer.take(final=True) == "##"


def test_stop_texts_wait_for_the_minimum_of_tokens() -> None:
    answer = AnswerText(Letters(), ("b",), min_new_tokens=3)
    assert not answer.push(ids_of("abc"))
    assert answer.push(ids_of("db"))
    assert answer.finish() == "abcd"


def test_generate_answers_each_prompt_as_alone(model: Model, pictures: list[Path]) -> None:
    red, green, blue = pictures
    data_uri = "data:image/png;base64," + base64.b64encode(green.read_bytes()).decode()
    images = [red, None, [blue, red], green.read_bytes(), data_uri, Image.open(blue)]
    prompts = ["What?", "Say something.", "From <ImageHere> to <ImageHere>?", "Why?", "Why?", "Who is it?"]
    together = model.generate(images=images, prompts=prompts, max_new_tokens=9)
    for image, prompt, answer in zip(images, prompts, together, strict=True):
        [alone] = model.generate(images=[image], prompts=[prompt], max_new_tokens=9)
        assert alone == answer
        assert answer.new_tokens == len(answer.ids) <= 9
    assert together[3] == together[4]
    assert together[0].prompt_tokens > model.config.tokens_per_image
    assert model.generate(images=[red], prompts=["What?"], max_new_tokens=9) != together[3:4]


def test_a_picture_is_encoded_once(model: Model, pictures: list[Path]) -> None:
    encoder = model.answerer.encoder
    pixels = model.answerer.read_pixels(pictures[:1])
    [first] = encoder.encode(pixels)
    [again] = encoder.encode([pixels[0].copy()])
    assert again is first
    both = encoder.encode(pixels * 3)
    assert all(tokens is first for tokens in both)


def test_pictures_encode_the_same_in_any_batch(model: Model) -> None:
    rng = np.random.default_rng(0)
    size = model.config.vit.image_size
    pixels = [rng.standard_normal((size, size, 3)).astype(np.float32) for _ in range(11)]
    together = model.answerer.encoder.encode(pixels)
    for picture, tokens in zip(pixels, together, strict=True):
        alone = model.answerer.encoder._encode({"params": model.answerer.encoder.params}, picture[None])[0]
        np.testing.assert_allclose(tokens, alone, rtol=1e-5, atol=1e-5)


def test_streamed_pieces_make_the_answer(model: Model, pictures: list[Path]) -> None:
    options = {"max_new_tokens": 20, "temperature": 0.8, "seed": 4}
    [answer] = model.generate(images=[pictures[0]], prompts=["What?"], **options)
    pieces = list(model.stream("What?", pictures[0], **options))
    assert "".join(pieces).strip() == answer.text and len(pieces) > 1


def test_stop_texts_of_a_row(model: Model) -> None:
    [free] = model.generate(prompts=["Hello"], max_new_tokens=12, template="none")
    stop = free.text[5:7]
    [cut] = model.generate(prompts=["Hello"], max_new_tokens=12, template="none", stop=[stop])
    assert cut.text == free.text[: free.text.index(stop)].strip()
    assert cut.finish_reason == "stop" and cut.ids == free.ids[: len(cut.ids)]


def test_chat_remembers_and_resets(model: Model, pictures: list[Path]) -> None:
    chat = model.chat()
    chat.add_image(pictures[0])
    first = chat.answer("What is this?", temperature=0, max_new_tokens=8)
    second = chat.answer("And now?", temperature=0, max_new_tokens=8)
    assert second.prompt_tokens > first.prompt_tokens
    assert [role for role, _ in chat.messages] == ["user", "assistant", "user", "assistant"]
    chat.reset()
    chat.add_image(pictures[0])
    assert "".join(chat.stream("What is this?", temperature=0, max_new_tokens=8)).strip() == first.text
    assert chat.messages[-1] == ("assistant", first.text)


def test_a_stream_that_is_left_adds_nothing(model: Model) -> None:
    chat = model.chat()
    stream = chat.stream("Hello", temperature=0, max_new_tokens=30)
    next(stream)
    stream.close()
    assert chat.messages == ()
    options = {"temperature": 0, "max_new_tokens": 3}
    assert chat.ask("Hello", **options) == model.chat().ask("Hello", **options)


def test_a_long_chat_drops_its_oldest_tokens(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    chat = model.chat()
    chat.max_length = 60
    answer = chat.answer("word " * 40, temperature=0, max_new_tokens=10)
    assert answer.prompt_tokens == 50
    assert "no longer fit" in caplog.text
    with pytest.raises(UserError, match="leaves no room"):
        chat.ask("Hello", max_new_tokens=60)


@pytest.mark.parametrize(
    ("prompts", "images", "options", "message"),
    [
        (["a", "b"], [None], {}, "2 prompts but 1 entries"),
        ("a", None, {}, "must be a list"),
        (["a", " "], None, {"max_new_tokens": 9}, "prompt 1: the prompt is empty"),
        (["<ImageHere>"], None, {}, "no picture"),
        (["<ImageHere> <ImageHere>"], ["red.png"], {}, "2 <ImageHere>"),
        (["###Human: hi"], None, {}, "reserves"),
        (["a"], ["missing.png"], {}, "missing.png"),
        (["a"], [b"GIF89a"], {}, "not a picture that can be read"),
        (["a"], ["http://example.com/a.png"], {}, "http"),
        (["a"], [5], {}, "a picture is a path"),
        (["a\0"], None, {}, "NUL"),
        (["word " * 400], None, {}, "exceed the context"),
        (["a"], None, {"temperature": -1}, "temperature"),
        (["a"], None, {"template": "llama9"}, "unknown template"),
        (["a"], None, {"num_beams": 2, "temperature": 1.0}, "num_beams 2 searches and draws nothing"),
        (["a"], None, {"num_beams": 2, "max_new_tokens": 1000}, "exceed the context"),
        (["a"], None, {"max_new_tokens": 10**6}, "max_new_tokens"),
    ],
)
def test_bad_questions_are_refused(
    model: Model, pictures: list[Path], prompts: list, images: list | None, options: dict, message: str
) -> None:
    images = [str(pictures[0]) if image == "red.png" else image for image in images] if images else images
    with pytest.raises(UserError, match=message) as error:
        model.generate(prompts=prompts, images=images, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "unknown dtype"),
        ({"slots": 3}, "power of two"),
        ({"mesh": "fsdp=64"}, "64 devices"),
        ({"mesh": "rows=2"}, "rows=2"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_bad_ways_to_load_are_refused(model_dir: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(model_dir, **options)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.json"):
        load(tmp_path)


def test_float32_gives_way_when_memory_is_short(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, mesh = read_manifest(model_dir), make_mesh()
    assert make_plan(manifest, mesh).dtype == "float32"
    plan = make_plan(manifest, mesh, slots=1)
    monkeypatch.setattr("mgpt4_jax.generate.memory.free_memory", lambda *_: plan.total - 1)
    assert make_plan(manifest, mesh).dtype == "bfloat16"
    assert capsys.readouterr().err.startswith("float32 does not fit")
    assert make_plan(manifest, mesh, dtype="float32").slots == 1


def test_a_model_cut_over_devices_answers_the_same(model: Model, model_dir: Path, pictures: list[Path]) -> None:
    cut = load(model_dir, mesh="data=2,tensor=2", slots=4, max_length=256)
    options = {"images": [pictures[0], None], "prompts": ["What is this?", "Why?"], "max_new_tokens": 8}
    assert cut.generate(**options) == model.generate(**options)
