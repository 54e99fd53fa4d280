"""The shipped small models reach what their manifest says, and a shortened recipe learns to see.

A part of the small world is drawn from numbers of its own: the world of the manifest's seed, however little there is to
learn from in it, has the test scenes that the manifest's figures were measured on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mgpt4_jax.checkpoint import load_params, read_manifest
from mgpt4_jax.cli import main
from mgpt4_jax.data.shapes_words import DESCRIBE
from mgpt4_jax.models import build
from mgpt4_jax.tiny import CONFIGS, RANKED_AGAIN, ROOT, TEMPLATE
from mgpt4_jax.tiny_report import SHIPPED, sources

TINY = ROOT / "tiny"
MANIFEST = json.loads((TINY / "manifest.json").read_text())
FIGURES = MANIFEST["figures"]
POINTS = 1.0  # percent: processors round differently, and a few answers lie on the edge
MARGIN = 30.0  # percent, by which a short training of a new projection must beat the mean picture
LITTLE_TO_LEARN = ["--texts", "50", "--singles", "10", "--pairs", "60", "--curated", "3000"]
OVERRIDES = ["--overrides", str(CONFIGS / "overrides.yaml")]
WHOLE, PAIRS = ([str(word) for pair in given.items() for word in pair] for given in sources(TINY))
PARTS = WHOLE[: WHOLE.index("--projection")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world, and both models converted."""
    out = tmp_path_factory.mktemp("shipped")
    seed = str(MANIFEST["seed"])
    assert main(["data", "shapes", "--out", str(out / "world"), "--seed", seed, *LITTLE_TO_LEARN]) == 0
    talks, reads = ["--template", TEMPLATE], ["--qformer-tokenizer", str(TINY / "qformer_tokenizer")]
    assert main(["convert", *WHOLE, *OVERRIDES, *talks, "--out", str(out / "minigpt4")]) == 0
    assert main(["convert", *PAIRS, *OVERRIDES, *reads, "--out", str(out / "blip2")]) == 0
    return out


def measure(place: Path, name: str, model: Path, task: str, data: str, *options: str, images: str = "images") -> Any:
    test, out = place / "world" / "test", place / "scores" / name
    words = ["--data", str(test / data), "--images", str(test / images), "--out", str(out)]
    assert main(["eval", str(model), "--task", task, *words, *options]) == 0
    return json.loads((out / "scores.json").read_text())


def test_the_files_are_those_of_the_manifest() -> None:
    assert MANIFEST["files"].keys() == SHIPPED.keys()
    for name, about in MANIFEST["files"].items():
        assert hashlib.sha256((TINY / name).read_bytes()).hexdigest() == about["sha256"]
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 20e6


def test_verify_proves_them_against_pytorch(place: Path) -> None:
    assert main(["verify", str(place / "minigpt4"), *WHOLE]) == 0
    assert main(["verify", str(place / "blip2"), *PAIRS]) == 0


def test_transformers_reads_the_language_model(place: Path) -> None:
    """``LlamaForCausalLM`` and ``LlamaTokenizer`` on the shipped folder, as any user of them would."""
    theirs = transformers.LlamaForCausalLM.from_pretrained(TINY / "llm").eval()
    model = place / "llm"
    assert main(["convert", "--llm", str(TINY / "llm"), "--template", TEMPLATE, "--out", str(model)]) == 0
    ids = np.random.default_rng(0).integers(3, theirs.config.vocab_size, (3, 40))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    params = load_params(model, lambda _: jnp.float32)
    logits = build(read_manifest(model).config).apply({"params": params}, ids, np.full_like(ids, -1), None)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_questions_reach_the_recorded_figure(place: Path) -> None:
    scores = measure(place, "questions", place / "minigpt4", "vqa", "questions.json", "--prompt", "{}")
    recorded = FIGURES["test/finetune-questions/exact_match"]
    assert recorded > FIGURES["test/finetune-blind-questions/exact_match"] + MARGIN
    assert scores["exact_match"] == pytest.approx(recorded, abs=POINTS)


def test_captions_reach_the_recorded_figure(place: Path) -> None:
    words = ("--prompt", DESCRIBE[0], "--max-new-tokens", "64")
    scores = measure(place, "captions", place / "minigpt4", "caption", "captions.json", *words)
    assert scores["named"] == pytest.approx(FIGURES["test/finetune-captions/named"], abs=POINTS)


def test_retrieval_reaches_the_recorded_figures(place: Path) -> None:
    files = sorted((place / "world" / "test").glob("pairs_*.json"))
    scores = [measure(place, path.stem, place / "blip2", "retrieval", path.name, *RANKED_AGAIN) for path in files]
    for metric in ("itc_txt_r1", "itc_img_r1", "txt_r1", "img_r1"):
        reached = np.mean([one[metric] for one in scores])
        assert reached == pytest.approx(FIGURES[f"test/{metric}"], abs=POINTS)


def test_a_short_training_of_a_new_projection_sees(place: Path) -> None:
    """Not the projection that the Q-Former grew up with; the measure is what it says of the mean picture."""
    begin, run = place / "new", place / "run"
    assert main(["convert", *PARTS, *OVERRIDES, "--template", TEMPLATE, "--seed", "77", "--out", str(begin)]) == 0
    data = json.dumps([{"kind": "jsonl", "path": str(place / "world" / "curated.jsonl")}])
    words = ["--data.train", data, "--steps_per_epoch", "80", "--optim.peak_lr", "5e-3"]
    config = ["--config", str(CONFIGS / "finetune.yaml")]
    assert main(["train", *config, "--model", str(begin), "--run", str(run), *words]) == 0
    test = place / "world" / "test"
    (test / "some.json").write_text(json.dumps(json.loads((test / "questions.json").read_text())[::4]))
    asked = ("vqa", "some.json", "--prompt", "{}")
    seeing = measure(place, "seeing", run / "model", *asked)
    blind = measure(place, "blind", run / "model", *asked, images="blind")
    assert seeing["exact_match"] > blind["exact_match"] + MARGIN
