"""What a run needs before its first step: the recipes as published, weights on devices, programs that fit."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser

from mgpt4_jax import cli
from mgpt4_jax.checkpoint import ModelManifest, flatten, read_leaf, read_manifest
from mgpt4_jax.config import IGNORED, ModelConfig, llama2_7b, minigpt4, replace_fields, vicuna_7b, vicuna_13b
from mgpt4_jax.data.prompts import get_template
from mgpt4_jax.errors import UserError
from mgpt4_jax.models import num_parameters
from mgpt4_jax.sharding import make_mesh, put_batch
from mgpt4_jax.train import loop, setup
from mgpt4_jax.train.setup import Programs, device_arrays, load_state, make_plan, open_data, weight_table
from mgpt4_jax.train_config import TrainConfig
from tests.train.world import config_of, tiny_model, write_pictures, write_tiny_model

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
SIZES = {"7b": vicuna_7b(), "13b": vicuna_13b(), "llama2_7b": llama2_7b()}


# --- the recipes -----------------------------------------------------------------------------------------


def command_of(recipe: Path) -> list[str]:
    """The command in the first comment of a file, as a shell would read it."""
    lines = recipe.read_text().splitlines()
    comment = [line[1:].strip() for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]]
    text = "\n".join(comment).replace("\\\n", " ")
    return shlex.split(re.search(r"^mgpt4 .*$", text, re.MULTILINE)[0])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The configurations that ``mgpt4 train`` would have trained."""
    found: list[TrainConfig] = []

    def train(config: TrainConfig, *, resume_from: int | None) -> loop.Outcome:
        found.append(config)
        return loop.Outcome(config.num_steps, None, None)

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.chdir(ROOT)
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_first_comment_of_a_recipe_is_the_command_that_runs_it(recipe: Path, asked: list[TrainConfig]) -> None:
    program, command, *words = command_of(recipe)
    assert program == "mgpt4" and f"configs/{recipe.name}" in words
    if recipe.stem == "tiny_overrides":  # of the converter
        assert command == "convert" and words[words.index("--overrides") + 1] == f"configs/{recipe.name}"
        replace_fields(minigpt4(vicuna_7b()), yaml.safe_load(recipe.read_text()))
        return
    assert (command, cli.main([command, *words])) == ("train", 0)
    config, written = asked[0], yaml.safe_load(recipe.read_text())
    assert config.model and config.run and config.data.train
    assert "model" not in written and "run" not in written  # they are the user's
    assert (config.objective, config.batch_size) == (written["objective"], written["batch_size"])


def recipe_of(name: str, asked: list[TrainConfig]) -> TrainConfig:
    assert cli.main(["train", "--config", f"configs/{name}.yaml", "--model", "m", "--run", "r"]) == 0
    return asked[-1]


def optimiser_of(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config.optim)


ADAMW = {"weight_decay": 0.05, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "clip_norm": 0.0, "ema_decay": 0.0}
ADAMW |= {"schedule": "minigpt4", "decay_rule": "minigpt4"}


@pytest.mark.parametrize("size", SIZES)
def test_stage_1_as_published(size: str, asked: list[TrainConfig]) -> None:
    """MiniGPT-4 ``minigpt4_stage1_pretrain.yaml``, on 4 GPUs with 64 pairs each."""
    config = recipe_of(f"minigpt4_stage1_{size}", asked)
    assert optimiser_of(config) == ADAMW | {
        "peak_lr": 1e-4,
        "min_lr": 8e-5,
        "warmup_lr": 1e-6,
        "warmup_steps": 5000,
    }
    assert (config.epochs, config.steps_per_epoch, config.num_steps) == (4, 5000, 20_000)
    assert (config.batch_size, config.accumulation, config.seed) == (4 * 64, 1, 42)
    assert (config.objective, config.trainable, config.lora) == ("align", ("projection/*",), None)
    assert (config.text.max_text_length, config.text.end_symbol, config.text.instructions) == (32, "\n", ())
    laion, cc_sbu = config.data.train
    assert (laion.kind, laion.weight, cc_sbu.kind, cc_sbu.weight) == ("webdataset", 115, "webdataset", 14)
    assert "laion" in laion.path and "cc_sbu" in cc_sbu.path
    assert (config.data.transform, config.data.clean_captions) == ("resize", True)
    tokens = minigpt4(SIZES[size], with_qformer=size != "llama2_7b").tokens_per_image
    assert config.text.max_length == 1 + tokens + 32 == config.text.buckets[-1]  # the longest that there can be


FINE_TUNING = {"peak_lr": 1e-5, "min_lr": 0.0, "warmup_lr": 1e-8, "warmup_steps": 1000, "decay_rule": "lavis"}


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("caption_coco", 16 * 16, ("a photo of",)),
        ("vqa", 128, ("Question: {} Answer:",)),
        ("retrieval_coco", 16 * 14, ()),
    ],
)
def test_fine_tuning_as_published(name: str, rows: int, words: tuple[str, ...], asked: list[TrainConfig]) -> None:
    """LAVIS ``caption_coco_ft.yaml`` and ``retrieval_coco_ft.yaml``, and tables 7 to 9 of BLIP-2's paper."""
    config = recipe_of(f"blip2_{name}", asked)
    assert optimiser_of(config) == ADAMW | FINE_TUNING | {"schedule": "lavis"}
    assert (config.epochs, config.batch_size, config.text.instructions, config.seed) == (5, rows, words, 42)
    assert "vit/*" in config.trainable and config.remat
    samples = {"caption_coco": 566_747, "vqa": 443_757 + 214_354, "retrieval_coco": 566_747}[name]
    assert config.steps_per_epoch == -(-samples // rows)
    assert {source.kind for source in config.data.train} == {"lavis"}
    if name == "retrieval_coco":
        heads = {"vision_proj/*", "text_proj/*", "itm_head/*", "temp"}
        assert config.objective == "qformer_pretrain" and heads <= set(config.trainable)
    else:
        assert config.objective == "generative" and "projection/*" in config.trainable


@pytest.mark.parametrize(("name", "pairs"), [("vicuna7b", 128), ("flant5xl", 192)])
def test_instructblip_as_published(name: str, pairs: int, asked: list[TrainConfig]) -> None:
    """InstructBLIP's paper, and the lengths of LAVIS's models."""
    config = recipe_of(f"instructblip_{name}", asked)
    assert optimiser_of(config) == ADAMW | FINE_TUNING
    assert (config.num_steps, config.batch_size, config.checkpoint.every) == (60_000, pairs, 3000)
    assert (config.text.max_prompt_length, config.text.max_text_length, config.text.end_symbol) == (128, 256, "</s>")
    assert config.text.max_length >= 32 + 128 + 255
    assert (config.objective, config.lora) == ("generative", None)
    assert config.trainable == ("qformer/*", "projection/*", "ln_vision/*")


@pytest.mark.parametrize("size", SIZES)
def test_stage_2_as_published(size: str, asked: list[TrainConfig]) -> None:
    """MiniGPT-4 ``minigpt4_stage2_finetune.yaml`` and ``prompts/alignment.txt``."""
    config = recipe_of(f"minigpt4_stage2_{size}", asked)
    assert optimiser_of(config) == ADAMW | {
        "peak_lr": 3e-5,
        "min_lr": 1e-5,
        "warmup_lr": 1e-6,
        "warmup_steps": 200,
    }
    assert (config.epochs, config.steps_per_epoch, config.num_steps) == (5, 200, 1000)
    assert (config.batch_size, config.accumulation, config.seed) == (12, 1, 42)
    assert (config.objective, config.trainable, config.lora) == ("finetune", ("projection/*",), None)
    is_llama2 = size == "llama2_7b"
    assert (config.text.max_text_length, config.text.end_symbol) == (160, "</s>" if is_llama2 else "###")
    wrapped = "[INST] {} [/INST] " if is_llama2 else "###Human: {} ###Assistant: "
    assert get_template(config.text.template).training == wrapped
    assert [text.removeprefix("<Img><ImageHere></Img> ") for text in config.text.instructions] == [
        "Describe this image in detail.",
        "Take a look at this image and describe what you notice.",
        "Please provide a detailed description of the picture.",
        "Could you describe the contents of this image for me?",
    ]
    assert all(text.startswith("<Img><ImageHere></Img> ") for text in config.text.instructions)
    assert [source.kind for source in config.data.train] == ["cc_sbu_align"]
    assert (config.data.transform, config.data.clean_captions) == ("resize", False)
    tokens = minigpt4(SIZES[size], with_qformer=not is_llama2).tokens_per_image
    assert config.text.max_length >= 1 + tokens + 160 + 30  # 30: a template with its instruction
    assert config.checkpoint.every == config.steps_per_epoch


# --- the published sizes, of which nothing is loaded ----------------------------------------------------------


def described(folder: Path, config: ModelConfig) -> Path:
    """A model directory that holds no parameter."""
    folder.mkdir()
    ModelManifest(config, "vicuna_v0", num_parameters(config), dtypes={}).write(folder)
    return folder


def published_plan(size: str, folder: Path, asked: list[TrainConfig], mesh: str) -> setup.Plan:
    model = described(folder / "model", minigpt4(SIZES[size], with_qformer=size != "llama2_7b"))
    config = recipe_of(f"minigpt4_stage1_{size}", asked)
    return make_plan(dataclasses.replace(config, model=str(model), dtype="bfloat16"), make_mesh(mesh))


@pytest.mark.parametrize(
    ("size", "trained"), [("7b", 768 * 4096 + 4096), ("13b", 768 * 5120 + 5120), ("llama2_7b", 4 * 1408 * 4096 + 4096)]
)
def test_the_published_sizes_train_the_projection_alone(
    size: str, trained: int, tmp_path: Path, asked: list[TrainConfig]
) -> None:
    plan = published_plan(size, tmp_path, asked, "fsdp=8")
    leaves = flatten(plan.abstract.trainable)
    assert set(leaves) == {"projection/kernel", "projection/bias"}
    assert sum(leaf.size for leaf in leaves.values()) == trained
    assert {"7b": 3_149_824, "13b": 3_937_280, "llama2_7b": 23_072_768}[size] == trained


def test_the_table_of_the_published_size(tmp_path: Path, asked: list[TrainConfig]) -> None:
    """Its 32,001 tokens are not cut by tensor=8, and everything else of the language model's matrices is."""
    table = weight_table(published_plan("7b", tmp_path, asked, "tensor=8"))
    matrices, tokens = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32_001 * 4096
    llama = 2 * (matrices / 8 + tokens + 65 * 4096)  # bytes of bfloat16
    assert f"{llama / 1e9:.1f}" == "2.1"
    lines = {line.split()[0]: line.split() for line in table.splitlines()[1:]}
    assert lines["llama"] == ["llama", "6,738,423,808", "2.1", "GB", "frozen,", "bfloat16"]
    assert lines["projection"] == ["projection", "3,149,824", "12.6", "MB", "trained,", "float32"]
    assert lines["optimiser"] == ["optimiser", "25.2", "MB", "moments", "of", "what", "is", "trained"]
    (tmp_path / "again").mkdir()
    cut = weight_table(published_plan("7b", tmp_path / "again", asked, "fsdp=8"))
    lines = {line.split()[0]: line.split() for line in cut.splitlines()[1:]}
    assert lines["llama"][1:4] == ["6,738,423,808", "1.7", "GB"]
    assert lines["projection"][2:4] == ["1.6", "MB"] and lines["optimiser"][1:3] == ["3.1", "MB"]


# --- tiny models, which are loaded ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("setup")
    write_tiny_model(folder / "model")
    write_pictures(folder / "data", 16)
    return folder


def configured(world: Path, run: Path, **changes: Any) -> TrainConfig:
    """As the command line reads it."""
    values = config_of(world / "model", run, world / "data" / "data.jsonl", **changes)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, "train")
    return parser.instantiate(parser.parse_object({"train": values})).train


@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_the_table_says_what_lies_on_a_device(
    mesh: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(world, tmp_path, mesh=mesh, trainable=["projection/*", "llama/layers/attn/*"])
    plan = make_plan(dataclasses.replace(config, dtype="bfloat16"), make_mesh(mesh))
    monkeypatch.setattr(setup, "readable", lambda size: f"{size} B")
    state, frozen = load_state(plan)
    said: dict[tuple[str, str], int] = {}
    for line in weight_table(plan).splitlines()[1:]:
        part, size, kind = re.fullmatch(r"  (\S+) .* (\d+) B  (frozen|trained|moments).*", line).groups()
        said[part, kind] = int(size)
    held: dict[tuple[str, str], int] = {}
    for kind, tree in (("trained", state.trainable), ("frozen", frozen), ("moments", {"optimiser": state.optimizer})):
        for path, leaf in flatten(tree).items():
            on_first = [shard.data.nbytes for shard in leaf.addressable_shards if shard.device == jax.devices()[0]]
            key = (path.split("/")[0], kind)
            held[key] = held.get(key, 0) + sum(on_first)
    assert said == held
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    assert sum(size for (_, kind), size in held.items() if kind == "frozen") < whole / 2


def test_frozen_parameters_are_kept_in_the_compute_dtype_and_trained_ones_in_float32(
    world: Path, tmp_path: Path
) -> None:
    plan = make_plan(configured(world, tmp_path, dtype="bfloat16", optim={"ema_decay": 0.9}), make_mesh("fsdp=2"))
    state, frozen = load_state(plan)
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    floats = jax.tree.leaves((state.trainable, state.average, state.optimizer))
    assert {leaf.dtype for leaf in floats if leaf.ndim} == {jnp.dtype("float32")}
    stored = read_leaf(world / "model", "projection/kernel")
    np.testing.assert_array_equal(state.trainable["projection"]["kernel"], stored)
    np.testing.assert_array_equal(state.average["projection"]["kernel"], stored)


@pytest.mark.parametrize(
    ("free", "says"),
    [
        (
            500_000,
            r"the optimiser take 0\.9 MB on each device, where 0\.5 MB are free; cut it .*--mesh fsdp=N, or train",
        ),
        (
            1_200_000,
            r"rows of 24 takes \d\.\d MB of 1\.2 MB free on each device, beside 0\.9 MB that it is given: it does not "
            r"fit; raise accumulation .now 1., set remat: true, lower batch_size, or .* --mesh fsdp=N",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_figures(
    free: int, says: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read, or before the first step."""
    monkeypatch.setattr(setup, "free_memory", lambda *_: free)
    with pytest.raises(UserError, match=says) as error:
        loop.train(configured(world, tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "log.jsonl").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_an_evaluation_is_the_training_loss_without_dropout(world: Path, tmp_path: Path) -> None:
    plan = make_plan(configured(world, tmp_path), make_mesh("data=1"))
    data = open_data(plan, lambda _: None)
    state, frozen = load_state(plan)
    programs = Programs(plan, data.rows, frozen, lambda _: None)
    with data.loader.batches(0) as batches:
        batch = next(batches)
    arrays = put_batch(plan.mesh, device_arrays(batch))
    evaluated = programs.evaluation(24)(state.trainable, frozen, arrays)
    _, metrics = programs.step(24)(state, frozen, arrays, np.float32(1e-3))
    assert float(evaluated["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert evaluated["weight"] == (batch.targets != IGNORED).sum() > 0


def test_adapters_begin_at_nothing_and_are_trained_alone(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bfloat16, with a trace of steps 2 to 4."""
    lora = {"rank": 2, "targets": ["query", "down"], "dropout": 0.0}
    changes = {"lora": lora, "trainable": [], "dtype": "bfloat16", "steps_per_epoch": 4, "log": {"profile_step": 2}}
    config = configured(world, tmp_path / "run", **changes)
    state, _ = load_state(make_plan(config, make_mesh("data=1")))
    begun = flatten(state.trainable)
    names = {f"llama/layers/{matrix}_lora/{side}" for matrix in ("attn/query", "mlp/down") for side in "ab"}
    assert set(begun) == names
    assert not any(np.any(leaf) for path, leaf in begun.items() if path.endswith("/b"))
    assert all(np.all(leaf) for path, leaf in begun.items() if path.endswith("/a"))

    assert loop.train(config).step == 4
    manifest = read_manifest(tmp_path / "run" / "model")
    assert set(manifest.trained) == names and manifest.config.llama.lora.rank == 2
    assert {manifest.dtypes[path] for path in names} == {"float32"}
    for path in names:
        assert np.any(read_leaf(tmp_path / "run" / "model", path) != begun[path]), path

    traces = list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 10_000
    assert "profile of steps 2 to 4" in capsys.readouterr().err


def test_adapters_that_a_model_has_are_trained_further_and_others_refused(world: Path, tmp_path: Path) -> None:
    adapted = replace_fields(tiny_model(), {"llama": {"lora": {"rank": 2}}})
    model = described(tmp_path / "model", adapted)
    config = dataclasses.replace(configured(world, tmp_path / "run"), model=str(model))
    assert len(make_plan(config, make_mesh()).trained) == 2 + 4  # the projection; a and b of query and value
    with pytest.raises(UserError, match="has adapters already .*rank=2.*leave `lora` out to train those"):
        make_plan(dataclasses.replace(config, lora=dataclasses.replace(adapted.llama.lora, rank=4)), make_mesh())
