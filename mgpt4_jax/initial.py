"""Models that begin random, to be trained from nothing: ``mgpt4 init``.

The published recipes begin with trained towers, and what little they begin random is drawn as PyTorch draws it
(``convert/bert.py``). That spread, 0.02, fits widths near a thousand; here it follows the width instead, so that small
models learn too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mgpt4_jax.checkpoint import flatten, is_stacked, nest, new_directory, write_model
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.data.prompts import get_template
from mgpt4_jax.data.text import copy_tokenizer, load_bert_tokenizer, load_llama_tokenizer
from mgpt4_jax.errors import UserError
from mgpt4_jax.models import abstract_params, num_parameters
from mgpt4_jax.typing import Params

TEMPERATURE = 0.07
CROSSED = {"query": 2.5, "key": 2.5, "value": 1.8, "out": 1.8}
"""How much stronger cross-attention begins: then the queries tell pictures apart from the first step on."""
PLACED = 1.0
"""How strong the places of patches begin: they count as much as what is seen there."""
DEEP = 0.3
"""How much weaker what a block adds begins: what comes out is what went in, and a little of its surroundings."""


def init_model(
    config: ModelConfig,
    out: Path | str,
    *,
    seed: int = 0,
    template: str = "none",
    tokenizer: Path | str | None = None,
    qformer_tokenizer: Path | str | None = None,
    places: float = PLACED,
    overwrite: bool = False,
) -> Path:
    """Write a random model of ``config`` as a model directory, with copies of its tokenisers.

    Args:
      places: standard deviation of ``vit/pos_embed``. A tower that is asked for things keeps little of where they are;
        louder places last longer in it.

    Raises:
      UserError: ``places`` is no positive number, or a tokeniser cannot be read.
    """
    if not 0 < places < float("inf"):
        raise UserError(f"--places {places}: must be a positive number, for example 3")
    fields = {"config": config, "template": get_template(template).name, "num_parameters": num_parameters(config)}
    with new_directory(out, overwrite=overwrite) as partial:
        if tokenizer is not None:
            load_llama_tokenizer(tokenizer)  # refuses what is none
            copy_tokenizer(tokenizer, partial / "tokenizer")
        if qformer_tokenizer is not None:
            load_bert_tokenizer(qformer_tokenizer)
            copy_tokenizer(qformer_tokenizer, partial / "qformer_tokenizer")
        write_model(partial, initial_params(config, seed, places), fields)
    return Path(out)


def initial_params(config: ModelConfig, seed: int, places: float = PLACED) -> Params:
    """Float32 leaves; the numbers of a leaf depend on the seed and on the leaves before it."""
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name = path.split("/")[-1]
        if path == "temp":
            return np.full(shape, TEMPERATURE, np.float32)
        if name == "scale":
            return np.ones(shape, np.float32)
        if name in ("bias", "q_bias", "v_bias"):
            return np.zeros(shape, np.float32)
        return rng.normal(size=shape).astype(np.float32) * np.float32(spread(path, shape, places))

    return nest({path: draw(path, leaf.shape) for path, leaf in flatten(abstract_params(config)).items()})


def spread(path: str, shape: tuple[int, ...], places: float = PLACED) -> float:
    """The standard deviation of a matrix: one over the root of how many numbers are summed."""
    *_, part, name = path.split("/")
    if path == "vit/pos_embed":
        return places
    if path == "llama/embed_tokens/embedding":
        return 1.0  # what is read counts as much as what the blocks make of it
    if name != "kernel":
        return shape[-1] ** -0.5
    shape = shape[1:] if is_stacked(path) else shape
    inputs = shape[0] * shape[1] if part == "out" else shape[0]
    if "/cross_attn/" in path:
        return CROSSED[part] * inputs**-0.5
    adds = path.startswith(("vit/blocks/", "llama/layers/")) and part in ("out", "fc2", "down")
    return (DEEP if adds else 1.0) * inputs**-0.5
