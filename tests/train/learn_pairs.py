"""`make learn`: pre-train a small Q-Former with `mgpt4 train`, and look for held-out pictures and captions with it.

Prints recall at 1 among 100 pairs, by contrast (ITC) and after the matching head has ranked again (ITM), both ways, and
ends with 1 if ITM finds fewer than 90 of 100. Chance is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from train.pairs_world import write_pairs_model, write_world

from mgpt4_jax.api import load
from mgpt4_jax.evaluate.retrieval import Retriever, best_pairs, rerank

CONFIG = Path(__file__).parent.parent.parent / "configs" / "tiny_blip2_stage1.yaml"
HELD_OUT, PUBLISHED_K = 100, 128
ENOUGH = 0.9


class Recalls(NamedTuple):
    """Share of the pictures whose own caption comes first, and of the captions whose own picture does."""

    contrast: tuple[float, float]
    matching: tuple[float, float]


def learn(folder: Path, *, train: int, seed: int = 0, held_out: int = HELD_OUT, **options: Any) -> tuple[Path, Path]:
    """(the trained model, the held-out pairs); ``options`` of `mgpt4 train` by name, ``optim__peak_lr=1e-3``.

    On one device and with the optimisations that tests go without: hence in a process of its own.
    """
    pairs, others = write_world(folder / "pairs", train=train, held_out=held_out, seed=seed)
    model, run = write_pairs_model(folder / "begin", seed), folder / "run"
    source = json.dumps([{"kind": "jsonl", "path": str(pairs)}])
    command = [sys.executable, "-m", "mgpt4_jax.cli", "train", "--config", CONFIG, "--model", model, "--run", run]
    command += ["--data.train", source, "--seed", str(seed)]
    command += [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]
    of_tests = ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION")
    plain = {name: value for name, value in os.environ.items() if name not in of_tests}
    one_device = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    subprocess.run([str(word) for word in command], env=plain | one_device, check=True)
    return run / "model", others


def recalls(model_dir: Path, pairs: Path) -> Recalls:
    """Over all pairs of the file, in the way of `mgpt4 eval --task retrieval`: the published k = 128 is all of 100."""
    model, lines = load(model_dir), [json.loads(line) for line in pairs.read_text().splitlines()]
    retriever = Retriever(model.config, model.params, model.tokenizer)
    pictures, captions = [str(pairs.parent / line["image"]) for line in lines], [line["caption"] for line in lines]
    found = retriever.features(pictures, captions)
    best = best_pairs(found.similarity, PUBLISHED_K)
    ranked = rerank(found.similarity, best, retriever.match(found, best), PUBLISHED_K)
    return Recalls((_first(found.similarity), _first(found.similarity.T)), (_first(ranked[0]), _first(ranked[1])))


def _first(scores: np.ndarray) -> float:
    """How often the highest score of a row is that of its own pair."""
    return float(np.mean(scores.argmax(axis=1) == np.arange(len(scores))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the pictures, the first weights and the run")
    parser.add_argument("--train", type=int, default=6000, help="pairs to train on")
    parser.add_argument("--keep", type=Path, help="a new folder for the pictures, the run and the model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model, others = learn(arguments.keep or Path(scratch), train=arguments.train, seed=arguments.seed)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = recalls(model, others)
    print(f"training took {used.ru_utime + used.ru_stime:.0f} seconds of CPU")
    for name, (texts, images) in zip(("ITC", "ITC, then ITM"), found, strict=True):
        print(f"R@1 among {HELD_OUT} held-out pairs by {name}: captions {texts:.2f}, pictures {images:.2f}")
    return 0 if min(found.matching) >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
