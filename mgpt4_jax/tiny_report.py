"""What the small world's models reach: figures of a recipe's run, and the files to ship with their manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mgpt4_jax.checkpoint import read_leaf, read_manifest
from mgpt4_jax.errors import UserError
from mgpt4_jax.train.state import trainable_paths

STAGES = ("llm", "talk", "chat", "vision", "stage1", "stage2", "align", "finetune", "align-alone")
SHIPPED = {
    "eva_vit_g.pth": "stage1/eva_vit_g.pth",
    "blip2_pretrained.pth": "stage1/blip2_pretrained.pth",
    "blip2_pretrained_stage2.pth": "stage2/blip2_pretrained.pth",
    "pretrained_minigpt4.pth": "pretrained_minigpt4.pth",
    "llm/config.json": "llm/config.json",
    "llm/model.safetensors": "llm/model.safetensors",
    "llm/tokenizer.model": "llm/tokenizer.model",
    "llm/tokenizer_config.json": "llm/tokenizer_config.json",
    "qformer_tokenizer/vocab.txt": "../world/qformer_tokenizer/vocab.txt",
}
"""Name among the shipped files -> name from the folder ``files`` of a run."""
MANIFEST = "manifest.json"


def figures(out: Path) -> dict[str, Any]:
    """All scores of a run in ``out``, in percent: retrieval as the mean over its files of 100 pairs."""
    scores = {path.parent.name: json.loads(path.read_text()) for path in sorted((out / "scores").glob("*/scores.json"))}
    found: dict[str, Any] = {}
    for part in ("test", "unseen"):
        pairs = [values for name, values in scores.items() if name.startswith(f"{part}-pairs_")]
        if pairs:
            for metric in ("itc_txt_r1", "itc_img_r1", "txt_r1", "img_r1"):
                found[f"{part}/{metric}"] = round(float(np.mean([values[metric] for values in pairs])), 2)
    for kind, kept in (("questions", "exact_match"), ("captions", ("named", "CIDEr"))):
        for name, values in scores.items():
            if name.endswith(f"-{kind}"):
                shown = {key: round(value, 2) for key, value in values.items() if key.startswith(kept)}
                found |= {f"{name.replace('-', '/', 1)}/{key}": value for key, value in shown.items()}
    return found


def unchanged_parts(out: Path) -> dict[str, int]:
    """Of each stage how many frozen parameters are to the byte those of the model that it began with.

    Raises:
      UserError: one is not.
    """
    counts = {}
    for stage in STAGES:
        model = out / stage / "model"
        if not model.exists():
            continue
        config = yaml.safe_load((out / stage / "config.yaml").read_text())
        paths = list(read_manifest(model).dtypes)
        frozen = set(paths) - set(trainable_paths(paths, config["trainable"]))
        for path in frozen:
            if read_leaf(model, path).tobytes() != read_leaf(config["model"], path).tobytes():
                raise UserError(f"{model}: the frozen parameter {path} is not the one of {config['model']}")
        counts[stage] = len(frozen)
    return counts


def ship(out: Path, to: Path, *, seed: int, command: str) -> Path:
    """Copy the exported files of a run to ``to``, with a manifest of their hashes and of what they reach."""
    files = {}
    for name, source in SHIPPED.items():
        path = out / "files" / source
        if not path.is_file():
            raise UserError(f"{path}: is not there; run the recipe to its end first")
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to / name)
        files[name] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    seconds = {line["step"]: line["seconds"] for line in _lines(out / "seconds.jsonl")}
    manifest = {
        "command": command,
        "seed": seed,
        "files": files,
        "figures": figures(out),
        "frozen_unchanged": unchanged_parts(out),
        "seconds": seconds,
    }
    (to / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return to / MANIFEST


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, path.read_text().splitlines())
