"""`make learn`: pre-train a small Q-Former with `mgpt4 train`, then let `mgpt4 eval` and `mgpt4 search` show it.

Recall at 1 among 100 held-out pairs is what `mgpt4 eval` found, by contrast (ITC) and after the matching head has
ranked again (ITM), both ways; chance is 1. Ends with 1 if ITM finds fewer than 90 of 100. The searches are for two
whole captions, for a part of one, and for a scene that was drawn again. With `--keep` all of it can be looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from train.pairs_world import picture, scenes, write_pairs_model, write_world

CONFIG = Path(__file__).parent.parent.parent / "configs" / "tiny_blip2_stage1.yaml"
HELD_OUT = 100
ENOUGH = 90.0  # percent


class Shown(NamedTuple):
    """A search, and the first place of a picture that it is for: from 1, None if not among those that were shown."""

    query: str
    place: int | None


def run_command(folder: Path, *words: Any) -> str:
    """What `mgpt4` prints, run in ``folder``; command and output are printed too.

    On one device and with the optimisations that tests go without: hence in a process of its own.
    """
    command = [str(word) for word in words]
    print(f"$ mgpt4 {shlex.join(command)}", flush=True)
    of_tests = ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION")
    plain = {name: value for name, value in os.environ.items() if name not in of_tests}
    plain |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    called = [sys.executable, "-m", "mgpt4_jax.cli", *command]
    printed = subprocess.run(called, cwd=folder, env=plain, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(printed, flush=True)
    return printed


def learn(folder: Path, *, train: int, seed: int = 0, held_out: int = HELD_OUT, **options: Any) -> tuple[Path, Path]:
    """(the trained model, the held-out pairs); ``options`` of `mgpt4 train` by name, ``optim__peak_lr=1e-3``."""
    pairs, others = write_world(folder / "pairs", train=train, held_out=held_out, seed=seed)
    write_pairs_model(folder / "begin", seed)
    source = json.dumps([{"kind": "jsonl", "path": str(pairs.relative_to(folder))}])
    words = ["train", "--config", CONFIG, "--model", "begin", "--run", "run", "--data.train", source, "--seed", seed]
    run_command(folder, *words, *(f"--{name.replace('__', '.')}={value}" for name, value in options.items()))
    return folder / "run" / "model", others


def evaluate(folder: Path, model: Path, others: Path, **options: Any) -> dict[str, float]:
    """What `mgpt4 eval` leaves in ``folder/eval/scores.json``: recalls in percent, ``itc_*`` before matching."""
    data = others.with_name("pairs.json").relative_to(folder)
    words = ["eval", model.relative_to(folder), "--task", "retrieval", "--data", data, "--out", "eval"]
    run_command(folder, *words, *(f"--{name}={value}" for name, value in options.items()))
    return json.loads((folder / "eval" / "scores.json").read_text())


def search(folder: Path, model: Path, others: Path, seed: int = 0) -> Iterator[Shown]:
    """Index the held-out pictures and look for the first ones; each search leaves a page ``folder/found_N.html``."""
    captions = [json.loads(line)["caption"] for line in others.read_text().splitlines()]
    thing, again = captions[0].split(", ")[0], folder / "drawn_again.png"
    picture(scenes(1, seed + 1)[0], np.random.default_rng(seed + 2)).save(again)
    words = ["search", model.relative_to(folder), "--index", "pictures.index"]
    run_command(folder, *words, "--add", others.parent.relative_to(folder))
    with_thing = [number for number, text in enumerate(captions) if thing in text.split(", ")]
    queries = [([captions[0]], [0]), ([captions[1]], [1]), ([thing], with_thing), (["--image", again.name], [0])]
    for number, (query, wanted) in enumerate(queries, 1):
        found = run_command(folder, *words, *query, "-k", 5, "--page", f"found_{number}.html").splitlines()
        names = tuple(f"{each:05d}.png" for each in wanted)
        places = [place for place, line in enumerate(found, 1) if line.endswith(names)]
        yield Shown(" ".join(query), places[0] if places else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the pictures, the first weights and the run")
    parser.add_argument("--train", type=int, default=6000, help="pairs to train on")
    parser.add_argument("--keep", type=Path, help="a new folder for the pictures, the run, the scores and the pages")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, start = (arguments.keep or Path(scratch)).absolute(), time.monotonic()
        model, others = learn(folder, train=arguments.train, seed=arguments.seed)
        used, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
        scores = evaluate(folder, model, others)
        for shown in list(search(folder, model, others, arguments.seed)):
            where = "not among the best 5" if shown.place is None else f"at place {shown.place}"
            print(f"search {shown.query}: a picture that it is for is {where}")
    print(f"training took {seconds:.0f} seconds, {used.ru_utime + used.ru_stime:.0f} of processor time")
    for name, prefix in (("ITC", "itc_"), ("ITC, then ITM", "")):
        texts, images = scores[f"{prefix}txt_r1"], scores[f"{prefix}img_r1"]
        print(f"R@1 among {HELD_OUT} held-out pairs by {name}: captions {texts:.0f}, pictures {images:.0f}")
    return 0 if min(scores["txt_r1"], scores["img_r1"]) >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
