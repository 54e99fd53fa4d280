"""BLIP-2 stage 1 of the recorded cases: a batch's losses and gradients, on one device or as the ranks of the original.

``python pretraining.py CASE MODEL OUT COORDINATOR RANKS RANK`` is one of those ranks, a process of its own.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from conversion import Converted, already_converted
from jax.sharding import NamedSharding, PartitionSpec
from training import unnormalised

from mgpt4_jax.checkpoint import flatten, load_params
from mgpt4_jax.distributed import DistributedOptions, initialize
from mgpt4_jax.losses import contrastive_loss, draw_negatives, matching_loss, negative_logits
from mgpt4_jax.models import build
from mgpt4_jax.sharding import make_mesh, process_rows, put_batch
from mgpt4_jax.train.pretraining import Negatives, Pretraining, pretrain
from mgpt4_jax.train.state import join, split, trainable_paths
from mgpt4_jax.typing import Array, Params

TRAINED = ("ln_vision/*", "qformer/*", "vision_proj/*", "text_proj/*", "itm_head/*", "temp")  # the ViT is frozen
BERT_PAD = 0
LOSSES = {"itc": "contrast", "itm": "matching", "itg": "captioning"}
DRAWS = 50  # sets of negatives


class Program:
    """Losses and gradients of a case's batch, with the recorded negatives."""

    def __init__(self, converted: Converted, groups: int = 1, params: Params | None = None):
        self.converted, self.case = converted, converted.case
        self.model = build(converted.config)
        dec_id = converted.config.qformer.vocab_size - 1  # [DEC] is the row behind BERT's own
        self.pretrain = partial(pretrain, dec_id=dec_id, pad_id=BERT_PAD, groups=groups)
        params = converted.params if params is None else params
        self.trainable, self.frozen = split(params, trainable_paths(flatten(params), TRAINED))
        self.losses = jax.jit(self._losses)
        self.gradient = jax.jit(jax.grad(self._weighted, has_aux=True))

    def batch(self, image: str = "image") -> dict[str, np.ndarray]:
        inputs = self.case.inputs
        pixels = unnormalised(self.case.pixels(image))[:, None]
        return {"ids": inputs["text_ids"].astype(np.int32), "mask": inputs["text_mask"] > 0, "pixels": pixels}

    def _losses(self, trainable: Any, frozen: Any, batch: Any, negatives: Negatives) -> Pretraining:
        params = {"params": join(trainable, frozen)}
        return self.model.apply(params, batch, jax.random.key(0), negatives=negatives, method=self.pretrain)

    def _weighted(self, trainable: Any, frozen: Any, batch: Any, negatives: Negatives, weights: Array) -> Any:
        found = self._losses(trainable, frozen, batch, negatives)
        parts = jnp.stack([getattr(found, name) for name in LOSSES.values()])
        return (weights * parts).sum(), found


def negatives_of(outputs: Any, prefix: str = "", suffix: str = "") -> Negatives:
    return Negatives(outputs[f"{prefix}neg_image_idx{suffix}"], outputs[f"{prefix}neg_text_idx{suffix}"])


# --- the ranks of the original -------------------------------------------------------------------------------


def run_ranks(converted: Converted) -> dict[str, Any]:
    """The ranks of the original as one batch, cut over as many devices, of however many processes."""
    case = converted.case
    ranks, rows = case.config["world_size"], case.config["per_rank_batch"]
    mesh = make_mesh(f"data={ranks}")
    params = load_params(converted.model_dir, jnp.float32, mesh)
    program = Program(converted, ranks, params)
    outputs = [
        {key.split(".", 1)[1]: values for key, values in case.outputs.items() if key.startswith(f"rank{rank}.")}
        for rank in range(ranks)
    ]
    negatives = Negatives(*(np.concatenate(parts) for parts in zip(*map(negatives_of, outputs), strict=True)))
    own = process_rows(mesh, ranks * rows)
    batch = put_batch(mesh, {name: values[own] for name, values in program.batch().items()})
    arguments = (program.trainable, program.frozen, batch, negatives, np.ones(3, np.float32))

    def run(*arguments: Any) -> Any:
        """All of it in one program, of which every process gets the whole: two that run at once may lock each other."""
        gradients, result = program.gradient(*arguments)
        return gradients, result, draw_all(result.image_to_text, result.text_to_image)

    replicated = NamedSharding(mesh, PartitionSpec())
    gradients, result, draws = jax.device_get(jax.jit(run, out_shardings=replicated)(*arguments))
    found: dict[str, Any] = {
        "grads_total_mean_over_ranks": converted.to_source(gradients),
        "draws": np.stack(draws),
        "pixels_shape": np.array(batch["pixels"].sharding.shard_shape(batch["pixels"].shape)),
    }
    total, targets = ranks * rows, jnp.eye(ranks * rows)
    words = caption_parts(Program(converted, params=params), ranks)
    for rank in range(ranks):
        own = slice(rank * rows, (rank + 1) * rows)
        pairs = np.concatenate([np.arange(total)[own] + third * total for third in range(3)])
        labels = (np.arange(3 * rows) < rows).astype(np.int32)
        parts = {
            "loss_itc": contrastive_loss(result.image_to_text[own], result.text_to_image[own], targets[own]),
            "loss_itm": matching_loss(result.match_logits[pairs], labels),
            "loss_lm": words[rank],
        }
        weights = {
            "weights_i2t": jax.nn.softmax(negative_logits(result.image_to_text, targets))[own],
            "weights_t2i": jax.nn.softmax(negative_logits(result.text_to_image, targets))[own],
        }
        found |= {f"rank{rank}.{name}": value for name, value in (parts | weights).items()}
        found[f"rank{rank}.loss"] = sum(float(value) for value in parts.values())
    return found


def draw_all(image_to_text: Array, text_to_image: Array) -> tuple[Array, Array]:
    """Our own negatives [draws b] of every text and every picture, from as many seeds."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    targets = jnp.eye(len(image_to_text))
    return jax.vmap(lambda key: draw_negatives(key, image_to_text, text_to_image, targets))(keys)


def caption_parts(program: Program, ranks: int) -> list[float]:
    """The captioning loss of each rank's rows alone; captions need no negatives."""
    found, rows = [], len(program.batch()["ids"]) // ranks
    none = Negatives(np.zeros(rows, np.int32), np.zeros(rows, np.int32))
    for rank in range(ranks):
        batch = {name: values[rank * rows : (rank + 1) * rows] for name, values in program.batch().items()}
        found.append(float(program.losses(program.trainable, program.frozen, batch, none).captioning))
    return found


def main() -> None:
    """One rank: all that this process found, gradients as ``gradient/NAME``, in ``OUT/RANK.npz``."""
    case, model_dir, out = Case(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    coordinator, ranks, rank = sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
    initialize(DistributedOptions(coordinator, ranks, rank, 180))
    assert (jax.process_count(), jax.process_index(), jax.local_device_count()) == (ranks, rank, 1)
    found = run_ranks(already_converted(case, model_dir))
    gradients = found.pop("grads_total_mean_over_ranks")
    np.savez(out / f"{rank}.npz", **found, **{f"gradient/{name}": value for name, value in gradients.items()})


if __name__ == "__main__":
    main()
