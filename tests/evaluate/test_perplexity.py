"""Perplexity: the loss of training, of each row alone, whatever batch and devices it is computed in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cases import Case
from conversion import convert_case
from train.instruct_world import write_instruct_model
from train.world import config_of, write_pictures, write_tiny_model

from mgpt4_jax import cli
from mgpt4_jax.errors import UserError
from mgpt4_jax.evaluate.perplexity import RowLoss, perplexity_config, scores_of
from mgpt4_jax.train.run_log import read_log

GOLDEN = Path(__file__).parent.parent / "golden" / "data"
KINDS = ("minigpt4", "instructblip", "blip2_opt", "blip2_t5")
FILES = {"settings.json", "losses.jsonl", "scores.json", "page.html"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {kind: convert_case(Case(GOLDEN / kind), folder / kind).model_dir for kind in KINDS[2:]}
    found["instructblip"] = write_instruct_model(folder / "instructblip", "llama")
    return {"minigpt4": write_tiny_model(folder / "minigpt4"), **found}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 samples: captions, answers to instructions of their own, words alone; the fifth has no picture."""
    path = write_pictures(tmp_path_factory.mktemp("pictures") / "some", 9, 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[4]["image"] = "nowhere.png"
    lines += [{"image": "00001.png", "instruction": "What is it?", "answer": "it is a thing of colour"}] * 2
    lines += [{"image": None, "instruction": "Say it.", "answer": f"that is the {word}"} for word in ("end", "red dog")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["eval", *map(str, arguments), "--task", "perplexity"])
    return code, *capsys.readouterr()


def losses_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


def assert_same(first: Path, second: Path) -> None:
    ours, theirs = losses_of(first), losses_of(second)
    exact = ("id", "sample", "tokens", "picture", "error")
    assert [[loss[key] for key in exact] for loss in ours] == [[loss[key] for key in exact] for loss in theirs]
    np.testing.assert_allclose([loss["nats"] for loss in ours], [loss["nats"] for loss in theirs], rtol=1e-5, atol=1e-5)
    one, other = (json.loads((out / "scores.json").read_text()) for out in (first, second))
    assert one == pytest.approx(other, rel=1e-5)


@pytest.fixture(scope="module")
def whole(models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in batches of eight, on one device; of 13 the last batch has three that only fill it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    words = [models["minigpt4"], "--data", data, "--out", out, "--task", "perplexity"]
    assert cli.main(["eval", *map(str, words)]) == 1  # for the picture that is missing
    return out


def test_each_sample_has_a_line(whole: Path, data: Path) -> None:
    found, scores = losses_of(whole), json.loads((whole / "scores.json").read_text())
    assert {path.name for path in whole.iterdir()} == FILES
    assert [loss["id"] for loss in found] == list(range(13))
    assert [loss["id"] for loss in found if loss["error"]] == [4] and "nowhere.png" in found[4]["error"]
    assert [loss["id"] for loss in found if not loss["picture"]] == [4, 11, 12]
    assert found[9] | {"id": 10, "sample": f"{data}:11"} == pytest.approx(found[10])
    good = [loss for loss in found if not loss["error"]]
    tokens = sum(loss["tokens"] for loss in good)
    assert (scores["samples"], scores["failed"], scores["tokens"]) == (12, 1, tokens)
    assert scores["nats_per_token"] == pytest.approx(sum(loss["nats"] for loss in good) / tokens)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["nats_per_token"]))
    words = good[-2:]
    alone = sum(loss["nats"] for loss in words) / sum(loss["tokens"] for loss in words)
    assert scores["perplexity_words"] == pytest.approx(math.exp(alone)) != scores["perplexity_pictures"]
    page = (whole / "page.html").read_text()
    assert page.count('class="card"') == 12 and "What is it?" in page and "data:image/jpeg" in page


@pytest.mark.parametrize("options", [("--batch-size", 1), ("--mesh", "data=8"), ("--mesh", "data=2,fsdp=2,tensor=2")])
def test_neither_batch_nor_devices_matter(
    options: tuple[Any, ...],
    whole: Path,
    models: dict[str, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(capsys, models["minigpt4"], "--data", data, "--out", tmp_path / "out", *options)[0] == 1
    assert_same(tmp_path / "out", whole)


def test_a_second_run_goes_on(
    whole: Path, models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = (models["minigpt4"], "--data", data, "--out", out)
    assert run(capsys, *command)[0] == 1
    lines = (out / "losses.jsonl").read_bytes().splitlines(True)
    (out / "losses.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:25])  # killed while it wrote
    for name in ("scores.json", "page.html"):
        (out / name).unlink()
    assert run(capsys, *command, "--batch-size", 3)[0] == 1
    assert (out / "losses.jsonl").read_bytes().startswith(b"".join(lines[:6]))
    assert_same(out, whole)
    code, _, err = run(capsys, *command, "--prompt", "What?")
    assert code == 2 and "another prompt" in err
    (out / "losses.jsonl").write_bytes(lines[1])
    assert "is of sample 1, out of order" in run(capsys, *command)[2]
    (out / "losses.jsonl").write_bytes(b'{"text": "x"}\n')
    assert "is not a loss of this program" in run(capsys, *command)[2]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loss_of_training(
    kind: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's last validation, of the model that it wrote, by the rows of the run."""
    pictures, trained = write_pictures(tmp_path / "pictures", 11, 4), tmp_path / "run"
    is_language = kind == "minigpt4"
    config = config_of(
        models[kind],
        trained,
        pictures,
        pictures,
        objective="finetune" if is_language else "generative",
        steps_per_epoch=2,
        text={"max_text_length": 24, "buckets": [96], "max_length": 96, "instructions": ["Describe it."]},
        data={"clean_captions": True},
        log={"validate_every": 0},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["train", "--config", str(tmp_path / "config.yaml")]) == 0
    [validation] = [line for line in read_log(trained / "log.jsonl") if line["kind"] == "validation"]
    command = (trained / "model", "--data", pictures, "--rows", trained / "config.yaml", "--batch-size", 3)
    code, shown, err = run(capsys, *command, "--out", tmp_path / "out")
    assert code == 0 and "perplexity" in shown, err
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["nats_per_token"] == pytest.approx(validation["loss"], rel=1e-5)
    assert run(capsys, *command, "--mesh", "data=3", "--out", tmp_path / "cut")[0] == 0
    assert_same(tmp_path / "cut", tmp_path / "out")


def test_what_stands_before_an_answer_matters(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt is that of samples without an instruction of their own."""
    found = []
    for name, options in (("none", ()), ("asked", ("--prompt", "What do you see?"))):
        out = tmp_path / name
        assert run(capsys, models["blip2_opt"], "--data", data, "--out", out, *options)[0] == 1
        found.append([loss["nats"] for loss in losses_of(out)])
        assert [loss["id"] for loss in losses_of(out) if loss["error"]] == [4, 11, 12]  # OPT describes pictures
    same = np.isclose(*found, rtol=1e-5)
    assert same.tolist() == [index in (4, 9, 10, 11, 12) for index in range(13)]


def test_scores_weigh_tokens() -> None:
    scores = scores_of([RowLoss(0, "a", math.log(16), 2), RowLoss(1, "b", math.log(2), 1)])
    assert scores == {"nats_per_token": pytest.approx(math.log(32) / 3), "perplexity": pytest.approx(32 ** (1 / 3))}


def test_errors_are_one_line(models: dict[str, Path], data: Path, tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("text: {end_symbol: x, colour: red}\n")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"image": "none.png", "caption": "x"}\n')
    model = models["minigpt4"]
    for options, message in (
        (("--data", tmp_path / "none.jsonl"), "none.jsonl"),
        (("--data", data, "--rows", config), "colour"),
        (("--data", data, "--rows", tmp_path / "no.yaml"), "no.yaml: cannot be read"),
        (("--data", data, "--rows", config, "--prompt", "x"), "colour"),
        (("--data", data, "--batch-size", 0), "batch_size"),
        (("--data", data, "--mesh", "data=8", "--batch-size", 3), "multiple"),
        (("--data", empty), "no sample can be measured"),
    ):
        code, out, err = run(capsys, model, *options, "--out", tmp_path / "out")
        assert (code, out) == (2, "") and message in err, (options, err)
        said = [line for line in err.splitlines() if not line.startswith("measuring: ")]
        assert len(said) == 1 and said[0].startswith("error: ")
    config.write_text("text: {end_symbol: x}\n")
    assert "leave --prompt" in run(capsys, model, "--data", data, "--rows", config, "--prompt", "x", "--out", config)[2]


def test_a_model_without_answers_is_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    model = convert_case(Case(GOLDEN / "blip2_stage1"), tmp_path / "blip2").model_dir
    with pytest.raises(UserError, match="blip2 model has no answers"):
        perplexity_config(model, tmp_path / "x.jsonl", tmp_path / "out")
