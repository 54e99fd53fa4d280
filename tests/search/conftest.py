from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mgpt4_jax.api import RetrievalModel, load
from mgpt4_jax.convert.convert import convert

GOLDEN = Path(__file__).parent.parent / "golden" / "data"


class Counted(RetrievalModel):
    """Counts the pictures that it embeds."""

    embedded = 0

    def embed_images(self, images: Sequence) -> np.ndarray:
        self.embedded += len(images)
        return super().embed_images(images)


@pytest.fixture(scope="session")
def retrieval_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded tiny BLIP-2, converted."""
    case, out = GOLDEN / "blip2_stage1", tmp_path_factory.mktemp("blip2") / "model"
    config = json.loads((case / "config.json").read_text())
    vit = {
        "num_heads": config["vit"]["num_heads"],
        "num_layers": config["vit"]["depth"],
        "image_size": config["image_size"],
    }
    overrides = {"vit": vit, "qformer": {"num_heads": config["qformer"]["num_attention_heads"]}}
    convert(qformer=case / "blip2_stage1.pth", overrides=overrides, qformer_tokenizer=case / "bert_tokenizer", out=out)
    return out


@pytest.fixture(scope="session")
def loaded(retrieval_dir: Path) -> Counted:
    model = load(retrieval_dir)
    return Counted(model.manifest, model.params, model.tokenizer, model.dtype)


@pytest.fixture
def model(loaded: Counted) -> Counted:
    loaded.embedded = 0
    return loaded


def write_picture(path: Path, seed: int) -> Path:
    """A picture of large patches in many colours; each seed gives another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(patches).resize((32, 32), Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty pictures, some in folders of the folder, some of other formats."""
    root = tmp_path / "photos"
    names = [f"{'ab'[i % 2]}/{i:02d}.{('png', 'JPG', 'webp', 'bmp')[i % 4]}" for i in range(20)]
    for seed, name in enumerate(names):
        write_picture(root / name, seed)
    (root / "notes.txt").write_text("no picture")
    return root
