"""Prove a converted model: the PyTorch model of ``transformers`` beside ours, layer by layer, on the same inputs.

Every layer of both sides gets the same input, so an error is named where it arises; the end of each
tower is compared again after all its layers, so that nothing hides between them. Besides, the values
of each layer's parameters are compared bit by bit, in whatever order: one altered weight shows even
where hardly any input reaches it. Memory is bounded by the largest layer, not by the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgpt4_jax.checkpoint import ModelManifest, read_manifest
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.errors import UserError
from mgpt4_jax.models import masks
from mgpt4_jax.models.layers import layer_norm, rms_norm, rotary_angles
from mgpt4_jax.models.llama import Llama, LlamaLayer, text_positions
from mgpt4_jax.models.minigpt4 import join_patches
from mgpt4_jax.models.vit import Vit, VitBlock

from .comparison import Comparison, VerifyReport, compare_step, linear, noise, same_values, twice
from .convert import Paths, Progress
from .readers import Source, open_source
from .recorded import compare_recorded
from .reference import LANGUAGE, NORM, QFORMER, VISION, Reference
from .verify_language import compare_opt, compare_t5
from .verify_qformer import compare_qformer

_ROWS, _TOKENS = 2, 136  # a rotary mistake passes on four tokens


def verify(
    model_dir: Paths,
    *,
    vit: Paths | None = None,
    qformer: Paths | None = None,
    llm: Paths | None = None,
    llm_delta: Paths | None = None,
    projection: Paths | None = None,
    from_dir: Paths | None = None,
    golden: Paths | None = None,
    tolerance: float = 1e-4,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare ``model_dir`` with the files that it was converted from; a part without its file is skipped.

    An error passes if it is within ``tolerance * (1 + the largest entry of its vector)``. ``golden`` is a
    directory of recorded outputs of the original programs. ``progress(done, total)`` counts layers.
    What was trained since the conversion is not compared. Raises ``UserError`` if a file is not the one that was
    converted (its sha256 differs), or without PyTorch.
    """
    manifest, trained = _as_converted(read_manifest(model_dir))
    paths = {"vit": vit, "qformer": qformer, "llm": llm, "llm_delta": llm_delta, "projection": projection}
    paths = {role: path for role, path in {**paths, "model": from_dir}.items() if path is not None}
    if not paths and golden is None:
        raise UserError(f"{model_dir}: nothing to verify against; give the files that it was converted from")
    sources = {role: open_source(path) for role, path in paths.items()}
    _check_hashes(Path(model_dir), manifest, sources)
    table = Comparison(Path(model_dir), manifest, tolerance, progress)
    table.skipped += [f"{name}: trained since the conversion" for name in trained]
    with jax.default_matmul_precision("highest"), jax.default_device(jax.devices("cpu")[0]):
        if sources:
            reference = Reference(sources, manifest.config)
            with reference.torch.no_grad():
                _compare_parts(table, reference, complete=set(sources) >= {s.role for s in manifest.sources})
        if golden is not None:
            compare_recorded(table, Path(golden))
    return VerifyReport(str(model_dir), tolerance, tuple(table.rows), tuple(table.skipped))


def _as_converted(manifest: ModelManifest) -> tuple[ModelManifest, list[str]]:
    """(the manifest without the parts that were trained since, their names)."""
    config, trained = manifest.config, set(manifest.trained)
    adapters = {path for path in trained if "_lora/" in path}
    if adapters:
        config = replace(config, llama=replace(config.llama, lora=None))
    parts = sorted({path.split("/")[0] for path in trained - adapters})
    dtypes = {
        path: dtype
        for path, dtype in manifest.dtypes.items()
        if path.split("/")[0] not in parts and path not in adapters
    }
    return replace(manifest, config=config, dtypes=dtypes), parts + ["LoRA adapters"] * bool(adapters)


def _check_hashes(model_dir: Path, manifest: ModelManifest, sources: Mapping[str, Source]) -> None:
    recorded = {(source.role, source.name): source.sha256 for source in manifest.sources}
    for role, source in sources.items():
        for path in source.files:
            if (role, path.name) not in recorded:
                names = ", ".join(f"{known} ({name})" for known, name in recorded)
                raise UserError(f"{path}: {model_dir} was not converted from it as {role}, but from {names}")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != recorded[role, path.name]:
                raise UserError(
                    f"{path}: has another sha256 ({digest[:12]}...) than the file that {model_dir} was converted from "
                    f"({recorded[role, path.name][:12]}...); give that file or convert again"
                )


def _compare_parts(table: Comparison, reference: Reference, *, complete: bool) -> None:
    """Each part whose file was given, in the order of the model; the picture flows from part to part."""
    config = table.manifest.config
    wanted: dict[str, tuple[Any, str]] = {
        "vit": (config.vit, f"{VISION}.encoder"),
        "qformer": (config.qformer, QFORMER),
        "llama": (config.llama, f"{LANGUAGE}.model.embed_tokens"),
        "opt": (config.opt, LANGUAGE),
        "t5": (config.t5, LANGUAGE),
    }
    held = {path.split("/")[0] for path in table.manifest.dtypes}
    wanted = {name: pair for name, pair in wanted.items() if name in held}
    given = [name for name, (_, prefix) in wanted.items() if reference.has(prefix)]
    table.skipped += [f"{name}: its file was not given" for name in wanted if name not in given]
    if "llama" in given and config.llama.lora is not None and not reference.has_adapters:
        table.skipped.append("llama: the file of its LoRA adapters was not given")
        given.remove("llama")
    table.num_layers = sum(wanted[name][0].num_layers for name in given)
    table.num_layers += config.t5.num_decoder_layers if "t5" in given else 0
    pair = _random_tokens(config)
    if "vit" in given:
        has_norm = "ln_vision/scale" in table.manifest.dtypes
        if has_norm and not (complete or reference.has(NORM)):
            table.skipped.append("ln_vision: its file was not given")
            has_norm = False
        pair = _compare_vit(table, reference, has_norm=has_norm)
    if "qformer" in given:
        pair = compare_qformer(table, reference, pair)
    elif config.qformer is not None:
        pair = twice(noise(_ROWS, config.qformer.num_queries, config.qformer.hidden_size))
    elif config.vit is not None and config.llama is not None:
        pair = np.asarray(join_patches(jnp.asarray(pair), config.patches_per_token))
    has_projection = "projection/kernel" in table.manifest.dtypes
    if has_projection and reference.has("language_projection"):
        _compare_projection(table, reference, pair)
    elif has_projection:
        table.skipped.append("projection: its file was not given, or there is none yet")
    for name, compare in (("llama", _compare_llama), ("opt", compare_opt), ("t5", compare_t5)):
        if name in given:
            compare(table, reference)


def _random_tokens(config: ModelConfig) -> np.ndarray:
    """Stand for the picture where there is no ViT to compare."""
    if config.vit is not None:
        return twice(noise(_ROWS, config.vit.num_positions, config.vit.hidden_size))
    return twice(noise(_ROWS, 9, config.qformer.encoder_size if config.qformer else 1))


def _compare_vit(table: Comparison, reference: Reference, *, has_norm: bool) -> np.ndarray:
    config = table.manifest.config.vit
    pixels = noise(_ROWS, config.image_size, config.image_size, 3)
    embeddings = reference.vision_embeddings()
    stem = table.params("vit", without="blocks")
    first = jax.tree.map(lambda leaf: leaf[None], table.params("vit/blocks", 0))
    tower = Vit(replace(config, num_layers=1))  # its first block is compared below
    _, sown = jax.jit(partial(tower.apply, mutable="intermediates"))({"params": stem | {"blocks": first}}, pixels)
    images = reference.torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    patches = embeddings.patch_embedding(images).flatten(2).transpose(1, 2)
    table.add("vit/patches", sown["intermediates"]["patches"][0], patches)
    theirs = embeddings(images, interpolate_pos_encoding=reference.is_resized).numpy()
    ours = np.asarray(sown["intermediates"]["embedded"][0])
    table.add("vit/embeddings", ours, theirs, None if reference.is_resized else same_values(stem, embeddings))

    pair = np.concatenate([ours, theirs])
    block = jax.jit(lambda params, x: VitBlock(config).apply({"params": params}, x)[0])
    for index in range(config.num_layers):
        module, params = reference.vision_layer(index), table.params("vit/blocks", index)
        weights = same_values(params, module)
        pair = compare_step(table, f"vit/blocks/{index}", pair, partial(block, params), module, weights)
        table.layer_done()
    table.add_pair("vit, all blocks", pair)
    if not has_norm:
        return pair
    norm, params = reference.vision_norm(), table.params("ln_vision")
    module = layer_norm(config.output_norm_eps, name="ln_vision", dtype=jnp.float32)
    apply = partial(module.apply, {"params": params})
    return compare_step(table, "ln_vision", pair, apply, norm, same_values(params, norm))


def _compare_projection(table: Comparison, reference: Reference, pair: np.ndarray) -> None:
    module, params = reference.linear("language_projection"), table.params("projection")
    pair = compare_step(table, "projection", pair, partial(linear, params), module, same_values(params, module))
    table.add_pair("projection, from the picture on", pair)


def _compare_llama(table: Comparison, reference: Reference) -> None:
    """Random text with padding on both sides, which is not compared."""
    import torch

    config = table.manifest.config.llama
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, _TOKENS))
    place = np.arange(_TOKENS)[None]
    valid = (place >= 7) & (place < _TOKENS - 5)
    positions = text_positions(jnp.asarray(valid))
    mask = masks.causal_mask(_TOKENS) & masks.padding_mask(jnp.asarray(valid))
    additive = torch.where(torch.from_numpy(np.array(mask)), 0.0, torch.finfo(torch.float32).min)[:, None]
    rotary = reference.llama_rotary(torch.from_numpy(np.array(positions)))
    angles = rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    table.add("llama/rotary (cosines)", jnp.cos(angles)[valid], rotary[0][..., : config.head_dim // 2][valid])

    embeddings, params = reference.llama_embeddings(), table.params("llama/embed_tokens")
    ours = Llama(config).apply({"params": {"embed_tokens": params}}, ids, method=Llama.embed)
    theirs = embeddings(torch.from_numpy(ids)).numpy()
    table.add("llama/embed_tokens", ours, theirs, same_values(params, embeddings))
    pair = np.concatenate([ours, theirs])
    del embeddings, params

    shared = [twice(np.asarray(x)) for x in (angles, mask)]
    layer = jax.jit(lambda params, x: LlamaLayer(config).apply({"params": params}, x, *shared)[0])
    for index in range(config.num_layers):
        module, params = reference.llama_layer(index), table.params("llama/layers", index)
        weights = same_values(params, module)
        theirs = partial(module, attention_mask=additive, position_embeddings=rotary)
        pair = compare_step(table, f"llama/layers/{index}", pair, partial(layer, params), theirs, weights, valid)
        table.layer_done()
    norm, params = reference.llama_norm(), table.params("llama/norm")
    module = rms_norm(config.rms_norm_eps, name="norm", dtype=jnp.float32)
    ours = partial(module.apply, {"params": params})
    pair = compare_step(table, "llama/norm", pair, ours, norm, same_values(params, norm), valid)

    name = "embed_tokens" if config.tie_embeddings else "lm_head"
    head, params = reference.llama_head(), table.params(f"llama/{name}")
    ours = partial(Llama(config).apply, {"params": {name: params}}, method=Llama.logits)
    kept = np.concatenate([half[valid] for half in np.split(pair, 2)])
    logits = compare_step(table, "llama/logits", kept, ours, head, same_values(params, head))
    table.add_pair("llama/logits, from the text on", logits)
