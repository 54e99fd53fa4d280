"""Compare with recorded outputs of the original programs (``inputs.npz`` and ``outputs.npz`` of one case)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgpt4_jax.checkpoint import load_params
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.errors import UserError
from mgpt4_jax.models import build
from mgpt4_jax.models.blip2 import Blip2
from mgpt4_jax.models.llama import Llama
from mgpt4_jax.models.masks import bidirectional_mask, padding_mask
from mgpt4_jax.models.minigpt4 import MiniGPT4
from mgpt4_jax.models.opt import Opt
from mgpt4_jax.models.qformer import Qformer
from mgpt4_jax.models.t5 import T5, shift_right
from mgpt4_jax.models.vit import Vit

from .comparison import Comparison

Arrays = Mapping[str, np.ndarray]
_SUFFIX = "_inputs_embeds"


def compare_recorded(table: Comparison, case: Path) -> None:
    """A row for each recorded array that this model has a counterpart of; none at all is a ``UserError``."""
    inputs, recorded = (_read(case / name) for name in ("inputs.npz", "outputs.npz"))
    config, params = table.manifest.config, load_params(table.model_dir, jnp.float32)
    before = len(table.rows)
    for part in (_vit, _qformer, _image_tokens, _language, _stage1):
        for name, ours, *valid in part(config, params, inputs, recorded):
            if name in recorded and recorded[name].shape == ours.shape:
                keep = valid[0] if valid else slice(None)
                table.add(f"recorded/{name}", np.asarray(ours)[keep], recorded[name][keep])
    if len(table.rows) == before:
        raise UserError(f"{case}: records nothing that {table.model_dir} computes; is it the case of another model?")


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; --golden wants a directory with inputs.npz and outputs.npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: is damaged ({error})") from error


def _pixels(config: ModelConfig, inputs: Arrays) -> np.ndarray | None:
    size = config.vit.image_size if config.vit else 0
    image = inputs.get("image")
    return image.transpose(0, 2, 3, 1) if image is not None and image.shape[1:] == (3, size, size) else None


def _vit(config: ModelConfig, params: Any, inputs: Arrays, recorded: Arrays) -> list[tuple[Any, ...]]:
    if (pixels := _pixels(config, inputs)) is None or "features" not in recorded:
        return []
    features, sown = jax.jit(partial(Vit(config.vit).apply, mutable="intermediates"))({"params": params["vit"]}, pixels)
    sown = sown["intermediates"]
    found = [("patch_embed", sown["patches"][0]), ("features", features)]
    found += [(f"block_{index}", hidden) for index, hidden in enumerate(sown["blocks"]["hidden"][0])]
    for ours, name in (("attn_out", "attn_0"), ("mlp_out", "mlp_0")):
        found.append((name, sown["blocks"][ours][0][0]))
    return found


def _qformer(config: ModelConfig, params: Any, inputs: Arrays, recorded: Arrays) -> list[tuple[Any, ...]]:
    image = inputs.get("image_embeds")
    if config.qformer is None or image is None or image.shape[-1] != config.qformer.encoder_size:
        return []
    run = jax.jit(partial(Qformer(config.qformer).apply, {"params": params["qformer"]}))
    found: list[tuple[Any, ...]] = [("image_only_last", run(image).queries)]
    if "image_atts_masked" in inputs:
        mask = inputs["image_atts_masked"].astype(bool)[:, None]
        found.append(("image_only_masked_last", run(image, image_mask=mask).queries))
    if config.qformer.with_text and "text_ids" in inputs:
        ids, valid = inputs["text_ids"], inputs["text_mask"].astype(bool)
        found.append(("text_only_last", run(text_ids=ids, mask=padding_mask(valid)).text, valid))
        joint = run(image, ids, mask=bidirectional_mask(config.qformer.num_queries, valid))
        found.append(("multimodal_last", jnp.concatenate([joint.queries, joint.text], axis=1)))
    return found


def _image_tokens(config: ModelConfig, params: Any, inputs: Arrays, recorded: Arrays) -> list[tuple[Any, ...]]:
    if config.architecture != "minigpt4" or (pixels := _pixels(config, inputs)) is None:
        return []
    run = jax.jit(partial(build(config).apply, method=MiniGPT4.encode_image))
    return [("img_embeds", run({"params": params}, pixels))]


def _language(config: ModelConfig, params: Any, inputs: Arrays, recorded: Arrays) -> list[tuple[Any, ...]]:
    if config.t5 is not None:
        return _prefix_language(config, params, recorded)
    if config.language_model is None:
        return []
    if config.opt is not None:
        run = jax.jit(partial(Opt(config.opt).apply, {"params": params["opt"]}))
    else:
        run = jax.jit(partial(Llama(config.llama).apply, {"params": params["llama"]}))
    found = []
    for name in recorded:
        case = name.removesuffix(_SUFFIX)
        fits = recorded[name].shape[-1:] == (config.language_model.hidden_size,)
        if name.endswith(_SUFFIX) and f"{case}_logits" in recorded and fits:
            valid = recorded[f"{case}_attention_mask"].astype(bool)
            found.append((f"{case}_logits", run(recorded[name], valid), valid))
    return found


def _prefix_language(config: ModelConfig, params: Any, recorded: Arrays) -> list[tuple[Any, ...]]:
    """The one batch of BLIP-2 on T5."""
    embeds = recorded.get("inputs_embeds")
    if embeds is None or embeds.shape[-1] != config.t5.hidden_size or "encoder_last" not in recorded:
        return []
    bound, valid = T5(config.t5).bind({"params": params["t5"]}), recorded["attention_mask"].astype(bool)
    targets, counted = recorded["targets"], recorded["decoder_attention_mask"].astype(bool)
    encoded = jax.jit(bound.encode)(embeds, valid)
    logits = jax.jit(bound.decode)(shift_right(targets, config.t5), encoded, valid, counted)
    return [("encoder_last", encoded, valid), ("logits", logits, counted)]


def _stage1(config: ModelConfig, params: Any, inputs: Arrays, recorded: Arrays) -> list[tuple[Any, ...]]:
    if config.architecture != "blip2" or (pixels := _pixels(config, inputs)) is None:
        return []
    run = partial(Blip2(config).apply, {"params": params})
    image = jax.jit(partial(run, method=Blip2.image_features))(pixels)
    found = [("image_embeds", image.tokens), ("query_last", image.queries), ("image_feats", image.embeds)]
    if "text_ids" in inputs:
        text = jax.jit(partial(run, method=Blip2.text_features))(inputs["text_ids"], inputs["text_mask"].astype(bool))
        found.append(("text_feat", text[:, 0]))
    return found
