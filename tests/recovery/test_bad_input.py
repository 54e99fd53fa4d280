"""Starts that cannot work: each ends with exit code 2 and one line that names the file, key or value and the mend."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recovery.runs import World, checkpoint_steps, contents, copy, error_line, start
from tiny import QFORMER, VIT, random_params
from train.world import merge, tiny_model, write_tiny_model

from mgpt4_jax.checkpoint import new_directory, write_model
from mgpt4_jax.cli import main
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.models import num_parameters

Say = pytest.CaptureFixture[str]


def refused(say: Say, code: int) -> str:
    assert code == 2
    return error_line(say.readouterr().err)


def data_of(path: Path, **changes: Any) -> dict[str, Any]:
    return {"data": {"train": [{"kind": "jsonl", "path": str(path), **changes}]}}


def jsonl(folder: Path, *lines: Any) -> Path:
    """A data set of these lines; text stays as it is."""
    folder.mkdir(exist_ok=True)
    path = folder / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# -- the configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"learning_rate": 1e-4}, "learning_rate"),
        ({"optim": {"lr": 1e-4}}, "optim.lr"),
        ({"batch_size": "many"}, "batch_size"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": 8.5}, "batch_size"),
        ({"optim": {"peak_lr": "1e-4 or so"}}, "optim.peak_lr"),
        ({"optim": {"peak_lr": float("nan")}}, "optim.peak_lr must be"),
        ({"optim": {"beta2": 1.0}}, "optim.beta2 must be below 1"),
        ({"objective": "pretrain"}, "objective"),
        ({"data": {"train": []}}, "data.train names no source"),
        ({"data": {"train": [{"kind": "csv", "path": "a.csv"}]}}, "kind"),
        ({"data": {"train": [{"kind": "jsonl", "path": "a.jsonl", "weight": 0}]}}, "weight"),
        ({"data": {"max_bad_share": 2.0}}, "data.max_bad_share is a share from 0 to 1"),
        ({"accumulation": 3}, "batch_size 8 cannot be cut into accumulation=3 parts"),
        ({"objective": "finetune"}, "objective 'finetune' needs text.instructions"),
        ({"text": {"instructions": ["What is it?"]}}, "for text.instructions use 'finetune'"),
        ({"trainable": []}, "nothing is trained: name patterns in trainable, or give lora"),
        ({"checkpoint": {"keep_last": 0}}, "checkpoint.keep_last must be"),
        ({"lora": {"targets": ["queries"]}}, "lora.targets: unknown matrix 'queries'; known: query, key"),
        ({"lora": {"rank": 0}}, "lora.rank must be a whole number from 1"),
        ({"lora": {"dropout": 1.0}}, "lora needs at least one target, and a dropout below 1"),
    ],
)
def test_a_value_of_the_configuration(
    world: World, tmp_path: Path, capsys: Say, changes: dict[str, Any], expected: str
) -> None:
    assert expected in refused(capsys, world.start(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_no_configuration(tmp_path: Path, capsys: Say) -> None:
    assert "data.train" in refused(capsys, main(["train", "--model", "m", "--run", str(tmp_path / "run")]))
    assert str(tmp_path / "no.yaml") in refused(capsys, main(["train", "--config", str(tmp_path / "no.yaml")]))


def test_a_configuration_that_is_no_yaml(tmp_path: Path, capsys: Say) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("batch_size: 8\nmodel: [unclosed\n")
    for words in (["--config", str(path)], [f"--config={path}"]):
        said = refused(capsys, main(["train", *words]))
        assert f"{path}, line 3, column 1: is not valid YAML (expected ',' or ']'" in said
    path.write_bytes(b"\xff\xfe\x00")
    assert f"{path}: is not valid YAML" in refused(capsys, main(["train", "--config", str(path)]))
    path.write_text("many words\n")
    assert f"{path}: holds no settings" in refused(capsys, main(["train", "--config", str(path)]))


@pytest.mark.parametrize(("key", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed_before_anything_is_read(
    world: World, tmp_path: Path, capsys: Say, monkeypatch: pytest.MonkeyPatch, key: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(capsys, world.start(tmp_path / "run", model=str(tmp_path / "no model"), log={key: True}))
    assert f"log.{key} is true and {package} is not installed" in said


# -- the model --------------------------------------------------------------------------------------------


def _without_tokenizer(world: World, folder: Path) -> Path:
    model = copy(world.model, folder / "model")
    shutil.rmtree(model / "tokenizer")
    return model


def _of(architecture: str) -> Callable[[World, Path], Path]:
    def write(world: World, folder: Path) -> Path:
        config = {
            "llama": ModelConfig("llama", None, None, tiny_model().llama),
            "blip2": ModelConfig("blip2", VIT, replace(QFORMER, with_text=True), None),
        }[architecture]
        with new_directory(folder / "model") as partial:
            fields = {"config": config, "template": "vicuna_v0", "num_parameters": num_parameters(config)}
            write_model(partial, random_params(config), fields)
        return folder / "model"

    return write


def _missing(world: World, folder: Path) -> Path:
    return folder / "model"


def _an_empty_folder(world: World, folder: Path) -> Path:
    (folder / "model").mkdir()
    return folder / "model"


def _without_a_parameter(world: World, folder: Path) -> Path:
    model = copy(world.model, folder / "model")
    shutil.rmtree(next((model / "params").glob("projection.kernel*")))
    return model


def _of_few_words(world: World, folder: Path) -> Path:
    """A language model that knows fewer words than its tokeniser."""
    return write_tiny_model(folder / "model", tiny_model(vocab_size=200))


@pytest.mark.parametrize(
    "make, expected",
    [
        (_missing, "model"),
        (_an_empty_folder, "model"),
        (_without_tokenizer, "tokenizer"),
        (_without_a_parameter, "projection"),
        (_of_few_words, "its model knows 200"),
        (_of("llama"), "not llama"),
        (_of("blip2"), "not blip2"),
    ],
)
def test_a_model(world: World, tmp_path: Path, capsys: Say, make: Callable[[World, Path], Path], expected: str) -> None:
    model = make(world, tmp_path)
    message = refused(capsys, world.start(tmp_path / "run", model=str(model)))
    assert str(model) in message and expected in message
    assert not (tmp_path / "run" / "curves.png").exists()


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"trainable": ["projector/*"]}, "trainable: 'projector/*' names no parameter; the parts are"),
        ({"trainable": ["projection/*", "qformer/nothing"]}, "trainable: 'qformer/nothing' names no parameter"),
        ({"text": {"template": "vicuna_v99"}}, "vicuna_v99"),
        ({"mesh": "data=16"}, "data=16"),
        ({"mesh": "rows=2"}, "rows"),
        ({"mesh": "data=two"}, "data=two"),
        ({"mesh": "data=3"}, "batch_size"),
        ({"batch_size": 4, "mesh": "data=8"}, "batch_size"),
        ({"text": {"buckets": [4], "max_length": 4}}, "all are bad"),
        (
            {"accumulation": 4, "mesh": "data=2,fsdp=2"},
            "accumulation 4 cuts batch_size 8 into parts of 2, which data=2 x fsdp=2 cannot share out evenly; lower "
            "it, or take a batch_size of 16",
        ),
        (
            {"text": {"buckets": [], "max_length": 257}},
            "text.max_length: rows of 257 are longer than the 256 positions",
        ),
        ({"text": {"buckets": [24, 300]}}, "text.buckets: rows of 300 are longer than the 256 positions of"),
    ],
)
def test_what_does_not_fit_the_model(
    world: World, tmp_path: Path, capsys: Say, changes: dict[str, Any], expected: str
) -> None:
    assert expected in refused(capsys, world.start(tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "model").exists()


# -- the data ---------------------------------------------------------------------------------------------


def test_a_data_set_that_is_missing(world: World, tmp_path: Path, capsys: Say) -> None:
    path = tmp_path / "no.jsonl"
    assert str(path) in refused(capsys, world.start(tmp_path / "run", **data_of(path)))


@pytest.mark.parametrize("kind", ["webdataset", "cc_sbu_align", "array_record", "tfds"])
def test_a_data_set_of_another_kind(world: World, tmp_path: Path, capsys: Say, kind: str) -> None:
    changes = data_of(world.train, kind=kind)
    assert str(world.train) in refused(capsys, world.start(tmp_path / "run", **changes))


def test_an_empty_data_set(world: World, tmp_path: Path, capsys: Say) -> None:
    path = jsonl(tmp_path / "data")
    message = refused(capsys, world.start(tmp_path / "run", **data_of(path)))
    assert str(path) in message


@pytest.mark.parametrize(
    "line, expected",
    [
        ({"image": "a.png", "caption": ""}, "the caption is empty"),
        ({"image": "a.png", "caption": ["a cat"]}, "the caption must be text, got list"),
        ({"image": "a.png", "caption": 7}, "the caption must be text, got int"),
        ({"image": "a.png"}, "caption"),
        ({"image": "missing.png", "caption": "a cat"}, "missing.png"),
        ({"image": "text.png", "caption": "a cat"}, "text.png"),
        ({"image": "cut.png", "caption": "a cat"}, "cut.png"),
        ({"image": "http://example.com/a.png", "caption": "a cat"}, "http://example.com/a.png"),
        ('{"image": "a.png", "caption": "a cat"', "is not valid JSON"),
        ('["a.png", "a cat"]', "is one JSON array"),
    ],
)
def test_every_sample_is_bad(world: World, tmp_path: Path, capsys: Say, line: Any, expected: str) -> None:
    """Named with its line, before a step is done."""
    path = jsonl(tmp_path / "data", *[line] * 4)
    good = next(world.train.parent.glob("*.png")).read_bytes()
    (path.parent / "a.png").write_bytes(good)
    (path.parent / "text.png").write_text("<html>not found</html>")
    (path.parent / "cut.png").write_bytes(good[: len(good) // 2])
    message = refused(capsys, world.start(tmp_path / "run", **data_of(path)))
    assert str(path) in message and expected in message
    assert checkpoint_steps(tmp_path / "run") == []


def test_every_sample_is_bad_for_workers_too(world: World, tmp_path: Path, capsys: Say) -> None:
    path = jsonl(tmp_path / "data", *[{"image": "a.png", "caption": ""}] * 4)
    changes = merge(data_of(path), {"data": {"num_workers": 1}})
    message = refused(capsys, world.start(tmp_path / "run", **changes))
    assert str(path) in message and "the caption is empty" in message


def test_a_validation_set_without_a_good_sample(world: World, tmp_path: Path, capsys: Say) -> None:
    path = jsonl(tmp_path / "data", {"image": "missing.png", "caption": "a cat"})
    changes = {"data": {"validation": [{"kind": "jsonl", "path": str(path)}]}}
    message = refused(capsys, world.start(tmp_path / "run", **changes))
    assert message.startswith("data.validation: no sample of it can be used")
    assert checkpoint_steps(tmp_path / "run") == [5]  # what was saved before stays


# -- the run ----------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_there(world: World, stopped: Path, tmp_path: Path, capsys: Say) -> None:
    message = refused(capsys, world.start(tmp_path / "run", "--resume-from", "5"))
    assert message == f"{tmp_path / 'run'}: has no checkpoint 5; it has none"
    before = contents(stopped)
    message = refused(capsys, world.start(stopped, "--resume-from", "11"))
    assert message == f"{stopped}: has no checkpoint 11; it has 5, 10, 12"
    message = refused(capsys, world.start(stopped, "--resume-from", "newest"))
    assert "resume-from" in message or "resume_from" in message
    assert contents(stopped) == before


def test_a_run_that_is_a_file(world: World, tmp_path: Path, capsys: Say) -> None:
    run = tmp_path / "run"
    run.write_text("a letter")
    message = refused(capsys, start(world.config(run)))
    assert message.startswith(f"{run}: the run directory cannot be written (")
    assert run.read_text() == "a letter"


def test_a_place_that_cannot_be_written(world: World, tmp_path: Path, capsys: Say) -> None:
    message = refused(capsys, world.start(tmp_path / "run", "--run", "/proc/run"))
    assert message.startswith("/proc/run: the run directory cannot be written (")


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed(
    world: World, tmp_path: Path, capsys: Say, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(capsys, world.start(tmp_path / "run", log={name: True}))
    assert message.startswith(f"log.{name} is true and {package} is not installed: pip install")
    assert checkpoint_steps(tmp_path / "run") == []


def test_a_log_of_another_program(world: World, tmp_path: Path) -> None:
    """Lines that are no records are left out, and the run begins."""
    run = tmp_path / "run"
    run.mkdir()
    lines = (b"\xff\xfe", b"null", b'{"step": "one"}', b"[1]", b'{"kind": "train", "step": 3, "losses": [1.0]}', b"")
    (run / "log.jsonl").write_bytes(b"\n".join(lines))
    assert world.start(run) == 0
