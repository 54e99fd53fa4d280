"""``mgpt4 eval`` on tiny models: results in the benchmark's format, scores, a page, and a second run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train.world import write_tiny_model

from mgpt4_jax import cli
from mgpt4_jax.commands.evaluating import _model_sha256
from mgpt4_jax.convert.convert import convert
from mgpt4_jax.evaluate.retrieval import best_pairs, rerank
from mgpt4_jax.evaluate.run import _retrieval_examples
from mgpt4_jax.evaluate.tasks import Pairs
from tests.generate.conftest import GOLDEN, model_dir, pictures  # noqa: F401  (fixtures)

FILES = {"settings.json", "questions.jsonl", "answers.jsonl", "results.json", "scores.json", "page.html"}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["eval", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def blip2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case, out = GOLDEN / "blip2_stage1", tmp_path_factory.mktemp("blip2") / "model"
    config = json.loads((case / "config.json").read_text())
    heads = {"num_heads": config["qformer"]["num_attention_heads"]}
    vit = {"num_heads": config["vit"]["num_heads"], "num_layers": config["vit"]["depth"]}
    overrides: dict[str, Any] = {"vit": {**vit, "image_size": config["image_size"]}, "qformer": heads}
    tokenizer = case / "bert_tokenizer"
    convert(qformer=case / "blip2_stage1.pth", overrides=overrides, qformer_tokenizer=tokenizer, out=out)
    return out


def test_captions(
    capsys: pytest.CaptureFixture[str],
    model_dir: Path,  # noqa: F811
    pictures: list[Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    data, out = tmp_path / "captions.json", tmp_path / "out"
    images = [{"id": 10 + i, "file_name": path.name} for i, path in enumerate(pictures)]
    notes = [{"image_id": 10 + i, "caption": f"<b>{path.stem}</b> square"} for i, path in enumerate(pictures)]
    data.write_text(json.dumps({"images": images, "annotations": notes}))
    command = (model_dir, "--task", "caption", "--data", data, "--out", out, "--max-new-tokens", 5)
    code, shown, err = run(capsys, *command)
    assert code == 0, err
    assert "CIDEr" in shown and "ROUGE_L" in shown
    assert {path.name for path in out.iterdir()} == FILES
    results = json.loads((out / "results.json").read_text())
    assert [entry["image_id"] for entry in results] == [10, 11, 12]
    assert all(isinstance(entry["caption"], str) for entry in results)
    page = (out / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3 and "<b>red</b>" not in page and "&lt;b&gt;red" in page
    whole, lines = (out / "answers.jsonl").read_bytes(), (out / "answers.jsonl").read_bytes().splitlines(True)
    (out / "answers.jsonl").write_bytes(lines[0] + lines[1][:20])  # killed while it wrote
    assert run(capsys, *command)[0] == 0
    assert (out / "answers.jsonl").read_bytes() == whole
    record = json.loads(lines[0]) | {"text": "one\u2028line"}
    (out / "answers.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n")
    assert run(capsys, *command)[0] == 0
    assert json.loads((out / "results.json").read_text())[0]["caption"] == "one\u2028line"
    cut = tmp_path / "cut"
    assert run(capsys, *command[:6], cut, *command[7:], "--mesh", "data=2,tensor=2")[0] == 0
    assert json.loads((cut / "results.json").read_text()) == results
    code, _, err = run(capsys, *command, "--prompt", "a picture of")
    assert code == 2 and "another prompt" in err and str(out) in err
    data.write_text(json.dumps({"images": images, "annotations": notes[:2]}))
    assert "another data_sha256" in run(capsys, *command)[2]


def test_a_model_is_known_by_what_it_holds(tmp_path: Path) -> None:
    """Wherever it lies and whenever it was written; model.json says nothing of weights that were never converted."""
    model = write_tiny_model(tmp_path / "model")
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    os.utime(copy / "model.json", (1, 1))
    same = _model_sha256(model)
    assert _model_sha256(copy) == same
    other = write_tiny_model(tmp_path / "other", seed=1)
    assert (other / "model.json").read_bytes() == (model / "model.json").read_bytes()
    assert _model_sha256(other) != same
    (copy / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert _model_sha256(copy) != same


def test_answers_with_a_picture_that_is_not_there(
    capsys: pytest.CaptureFixture[str],
    model_dir: Path,  # noqa: F811
    pictures: list[Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    entries = [
        {"question_id": i, "image": name, "question": "What colour?", "answer": ["red"] * 9 + ["blue"]}
        for i, name in enumerate([pictures[0].name, "nowhere.png"])
    ]
    data, out = tmp_path / "vqa.json", tmp_path / "out"
    data.write_text(json.dumps(entries))
    code, shown, err = run(
        capsys, model_dir, "--task", "vqa", "--data", data, "--out", out, "--max-new-tokens", 3, "--num-beams", 2
    )
    assert code == 1 and "1 failed" in err and "accuracy" in shown
    results = json.loads((out / "results.json").read_text())
    assert [entry["question_id"] for entry in results] == [0, 1] and results[1]["answer"] == ""
    prompts = [json.loads(line)["prompt"] for line in (out / "questions.jsonl").read_text().splitlines()]
    assert prompts == ["Question: What colour? Short answer:"] * 2
    assert "no picture" in (out / "page.html").read_text()


def test_retrieval_is_the_same_over_devices(
    capsys: pytest.CaptureFixture[str],
    blip2_dir: Path,
    pictures: list[Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    entries = [{"image": path.name, "caption": [f"a {path.stem} square", "a dog"]} for path in pictures]
    data = tmp_path / "pairs.json"
    data.write_text(json.dumps(entries))
    scores = []
    for name, options in (("one", ()), ("four", ("--mesh", "data=2,fsdp=2"))):
        out = tmp_path / name
        command = (blip2_dir, "--task", "retrieval", "--data", data, "--out", out, "--k", 2, *options)
        code, shown, err = run(capsys, *command)
        assert code == 0, err
        assert "txt_r1" in shown and "itc_img_r5" in shown
        scores.append(json.loads((out / "scores.json").read_text()))
        page = (out / "page.html").read_text()
        assert page.count('class="card"') == len(pictures) and "<th>R@10</th>" in page
        assert page.count('<div class="answer">✓') + page.count('<div class="answer wrong">✗') == 3 * len(pictures)
        part = out / "matched" / "000000.npy"
        scores.append(np.load(part).tolist())
        before = part.stat().st_mtime_ns
        assert run(capsys, *command)[0] == 0
        assert part.stat().st_mtime_ns == before
    assert scores[0] == scores[2]
    np.testing.assert_allclose(scores[1], scores[3], rtol=1e-4, atol=1e-5)


def test_the_page_of_retrieval_begins_with_the_worst() -> None:
    """The first picture is found with a margin of 3, the second is not found, the third just so."""
    pairs = Pairs(["a.png", "b.png", "c.png"], ["one", "two", "three"], [[0], [1], [2]], [0, 1, 2])
    shown = _retrieval_examples(pairs, np.array([[5.0, 2, 1], [2, 1, 0], [1, 2, 2.5]]), 3)
    assert [(each.name, each.score, list(each.wrong)) for each in shown] == [
        ("b.png", "wrong", [0, 2]),
        ("c.png", "right", [1, 2]),
        ("a.png", "right", [1, 2]),
    ]
    assert shown[0].answers[:2] == ["✗ 2.000 one", "✓ 1.000 two"]


def test_only_the_best_of_each_row_are_matched() -> None:
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.7, 0.3]], np.float32)
    pairs = best_pairs(similarity, 1)
    assert pairs.tolist() == [[0, 0], [1, 0], [1, 1], [1, 2]]
    to_text, to_image = rerank(similarity, pairs, np.array([1, 2, 3, 4], np.float32), 1)
    np.testing.assert_allclose(to_text, [[1.9, -100, -100], [2.8, -100, -100]], rtol=1e-6)
    np.testing.assert_allclose(to_image, [[1.9, -100], [-100, 3.7], [-100, 4.3]], rtol=1e-6)
    to_text, to_image = rerank(similarity, pairs, np.array([1, 2, 3, 4], np.float32), 1, weight=20)
    np.testing.assert_allclose(to_text, [[19, -100, -100], [18, -100, -100]], rtol=1e-6)
    np.testing.assert_allclose(to_image, [[19, -100], [-100, 17], [-100, 10]], rtol=1e-6)


def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str],
    model_dir: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = tmp_path / "x.json"
    data.write_text('[{"image": "a.jpg", "caption": "x"}]')
    for options, message in (
        (("--task", "retrieval", "--data", data), "retrieves nothing"),
        (("--task", "caption", "--data", tmp_path / "none.json"), "none.json: cannot be read"),
        (("--task", "caption", "--data", data, "--k", 0), "--k must be"),
        (("--task", "caption", "--data", data, "--similarity-weight", "-1"), "--similarity-weight must be"),
        (("--task", "dance", "--data", data), "dance"),
    ):
        code, out, err = run(capsys, model_dir, *options, "--out", tmp_path / "out")
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
