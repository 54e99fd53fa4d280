"""What the language model reads before it answers: ids of every segment, embedded contexts, the first logits."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, recorded
from claims import CONTEXTS, SEGMENTS
from comparing import Compare
from conversion import Converted

from mgpt4_jax.data.prompts import IMAGE, Prompt, build_prompt, crop_left
from mgpt4_jax.data.text import Tokenizer, load_llama_tokenizer
from mgpt4_jax.models import build
from mgpt4_jax.typing import Array


def segments_of(config: dict[str, Any], quantity: str, tokenizer: Tokenizer) -> Any:
    """The recorded nesting of ids, made by our tokeniser."""
    if quantity == "config.answer_ids":
        answers = config["answers"]
        return {end: [tokenizer.encode(answer + end) for answer in answers] for end in config["answer_ids"]}
    if quantity == "config.prompt_segments_ids":
        prompts = [config["stage1_prompt"], config["stage2_prompt"], *config["instr"]]
        return [[tokenizer.encode(segment) for segment in prompt.split(IMAGE)] for prompt in prompts]
    found = []
    for prompt in config["gen_prompts"]:
        built = build_prompt(tokenizer, prompt, num_images=prompt.count(IMAGE), tokens_per_image=1)
        found.append([part.tolist() for part in np.split(built.ids, np.flatnonzero(built.slots >= 0))])
        found[-1][1:] = [ids[1:] for ids in found[-1][1:]]  # the picture's own position leads each later segment
    return found


def contexts_of(case: Case, tokenizer: Tokenizer, tokens_per_image: int) -> dict[str, tuple[Prompt, int]]:
    """Each recorded context: its prompt and its first picture (a second one follows in the batch)."""

    def prompt(text: str) -> Prompt:
        return build_prompt(tokenizer, text, num_images=text.count(IMAGE), tokens_per_image=tokens_per_image)

    config = case.config
    found = {str(index): (prompt(text), index) for index, text in enumerate(config["gen_prompts"])}
    if "chat_truncated_context" in case.outputs:
        length = case.outputs["chat_truncated_context"].shape[1]
        found["chat_truncated_context"] = (crop_left(prompt(config["chat_truncated_prompt"]), length), 0)
    if "multi_image_context" in case.outputs:
        found["multi_image_context"] = (prompt(config["multi_image_prompt"]), 0)
    return found


def run(converted: Converted, tokenizer: Tokenizer) -> dict[str, Array]:
    """All contexts of a case as one right-padded batch."""
    case, model = converted.case, build(converted.config)
    contexts = contexts_of(case, tokenizer, converted.config.tokens_per_image)
    lengths = np.array([len(prompt) for prompt, _ in contexts.values()])
    ids = np.full((len(lengths), lengths.max()), tokenizer.pad_id, np.int32)
    slots = np.full_like(ids, -1)
    for row, (prompt, _) in enumerate(contexts.values()):
        ids[row, : len(prompt)], slots[row, : len(prompt)] = prompt.ids, prompt.slots
    pixels = case.pixels()
    first = np.array([index for _, index in contexts.values()])
    pictures = np.stack([first, first + 1], axis=1) % len(pixels)

    def read(module: nn.Module) -> tuple[Array, Array]:
        images = module.encode_image(pixels)[pictures].reshape(len(ids), -1, converted.config.llama.hidden_size)
        embeds = module.embed(ids, slots, images)
        logits = module.llama(embeds, jnp.arange(ids.shape[1]) < lengths[:, None])
        return embeds, logits[jnp.arange(len(ids)), lengths - 1]

    embeds, logits = jax.jit(lambda params: model.apply({"params": params}, method=read))(converted.params)
    found = {}
    for row, name in enumerate(contexts):
        embed = embeds[row : row + 1, : lengths[row]]
        found |= {f"gen_context_emb_{name}": embed, name: embed, f"gen_first_logits_{name}": logits[row : row + 1]}
    return found


@pytest.fixture(scope="module")
def tokenizer(converted: Callable[[Case], Converted]) -> Callable[[Case], Tokenizer]:
    return cache(lambda case: load_llama_tokenizer(converted(case).model_dir / "tokenizer"))


@pytest.fixture(scope="module")
def results(converted: Callable[[Case], Converted], tokenizer: Callable[[Case], Tokenizer]) -> Callable[[Case], Any]:
    return cache(lambda case: run(converted(case), tokenizer(case)))


@pytest.mark.parametrize(("case", "quantity"), recorded("minigpt4", *SEGMENTS))
def test_segments(case: Case, quantity: str, tokenizer: Callable[[Case], Tokenizer], compare: Compare) -> None:
    actual = segments_of(case.config, quantity, tokenizer(case))
    compare.equal(actual, case.config[re.sub(r"^config\.", "", quantity)])


@pytest.mark.parametrize(("case", "quantity"), recorded("minigpt4", *CONTEXTS))
def test_contexts(case: Case, quantity: str, results: Callable[[Case], Any], compare: Compare) -> None:
    compare.close(results(case)[quantity], case.outputs[quantity])
