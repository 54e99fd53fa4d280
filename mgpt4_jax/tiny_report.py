"""What the small world's models reach: figures of a recipe's run, and the files to ship with their manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mgpt4_jax.errors import UserError

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
RECORD = "seconds.jsonl"


def sources(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """What `mgpt4 convert` and `mgpt4 verify` are given of shipped files, by option: of MiniGPT-4, and of BLIP-2."""
    vision = {"--vit": folder / "eva_vit_g.pth"}
    talks = {"--qformer": folder / "blip2_pretrained_stage2.pth", "--llm": folder / "llm"}
    projects = {"--projection": folder / "pretrained_minigpt4.pth"}
    return vision | talks | projects, vision | {"--qformer": folder / "blip2_pretrained.pth"}


def figures(out: Path) -> dict[str, Any]:
    """All scores of a run in ``out``, in percent: retrieval as the mean over its files of 100 pairs.

    ``constant`` is what one would reach who knows of each kind the answer that is most often right and always gives it.
    """
    scores = {path.parent.name: json.loads(path.read_text()) for path in sorted((out / "scores").glob("*/scores.json"))}
    found: dict[str, Any] = {}
    for part in ("test", "unseen"):
        pairs = [values for name, values in scores.items() if name.startswith(f"{part}-pairs_")]
        if pairs:
            for metric in ("itc_txt_r1", "itc_img_r1", "txt_r1", "img_r1"):
                found[f"{part}/{metric}"] = round(float(np.mean([values[metric] for values in pairs])), 2)
        questions = out / "world" / part / "questions.json"
        if questions.exists():
            scores[f"{part}-constant-questions"] = constant_answers(json.loads(questions.read_text()))
    for kind, kept in (("questions", "exact_match"), ("captions", ("named", "CIDEr"))):
        for name, values in scores.items():
            if name.endswith(f"-{kind}"):
                shown = {key: round(value, 2) for key, value in values.items() if key.startswith(kept)}
                found |= {f"{name.replace('-', '/', 1)}/{key}": value for key, value in shown.items()}
    return found


def constant_answers(questions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Percent right, as `mgpt4 eval` names it, of the most frequent answer of each kind."""
    kinds: dict[str, Counter[str]] = {}
    for question in questions:
        kinds.setdefault(question["answer_type"], Counter())[question["answer"]] += 1
    right = {kind: max(answers.values()) for kind, answers in kinds.items()}
    shares = {f"exact_match_{kind}": 100 * right[kind] / kinds[kind].total() for kind in sorted(kinds)}
    return {"exact_match": 100 * sum(right.values()) / len(questions), **shares}


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
    seconds: dict[str, float] = {}
    for line in read_record(out / RECORD):  # of a step that was stopped, all its parts
        seconds[line["step"]] = round(seconds.get(line["step"], 0) + line["seconds"], 1)
    manifest = {
        "command": command,
        "seed": seed,
        "files": files,
        "figures": figures(out),
        "seconds": seconds,
    }
    (to / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return to / MANIFEST


def read_record(path: Path) -> list[dict[str, Any]]:
    """What `make tiny` wrote of each step that it ran: ``step``, ``seconds`` and exit ``code``."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
