"""`make tiny`: the steps it runs, passes over and goes on from, what it records, and where figures come from."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mgpt4_jax import tiny
from mgpt4_jax.errors import UserError
from mgpt4_jax.tiny import Step, evaluations, ready, recipe, run, same_recipe
from mgpt4_jax.tiny_report import RECORD, SHIPPED, constant_answers, figures, read_record, ship


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Puts a shell script in the place of `mgpt4`; ``$4`` is the folder that a step makes."""

    def put(script: str) -> None:
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


def steps_of(out: Path) -> list[Step]:
    return [
        Step(f"{word} {name}", [word, str(out / name)], out / name) for word, name in (("init", "a"), ("train", "b"))
    ]


def test_every_step_makes_what_the_next_ones_read(tmp_path: Path) -> None:
    """Models and files that a step is given were made before it, and no two steps make the same."""
    made: set[str] = set()
    for step in (*recipe(tmp_path, 0), *evaluations(tmp_path)):
        given = [word for word in step.words if word.startswith(str(tmp_path)) and word != str(step.result)]
        outputs = [step.words[at + 1] for at, word in enumerate(step.words) if word in ("--out", "--run")]
        for path in set(given) - set(outputs):
            assert any(Path(path) == Path(one) or Path(one) in Path(path).parents for one in made), (step.title, path)
        assert str(step.result) not in made
        made.add(str(step.result))
    assert len({step.title for step in recipe(tmp_path, 0)}) == len(list(recipe(tmp_path, 0)))


def test_seeds_are_used(tmp_path: Path) -> None:
    """Whatever draws numbers is told the seed, and the projection that is aligned is not the one of stage 2."""
    for step in recipe(tmp_path, 7):
        if step.words[0] != "export":
            assert step.words[step.words.index("--seed") + 1] in ("7", "14", "15")
    seeds = {step.title: step.words[-1] for step in recipe(tmp_path, 7) if step.title.startswith("join")}
    assert seeds == {"join stage2": "14", "join align": "15", "join alone": "15"}


def test_what_came_to_its_end_is_passed_over(tmp_path: Path, program: Callable[[str], None]) -> None:
    record = tmp_path / RECORD
    program('mkdir "$4"')
    run(iter(steps_of(tmp_path)), record)
    assert [(line["step"], line["code"]) for line in read_record(record)] == [("init a", 0), ("train b", 0)]
    program("exit 9")
    run(iter(steps_of(tmp_path)), record)
    assert len(read_record(record)) == 2


def test_steps_that_do_not_need_each_other_run_side_by_side(
    tmp_path: Path, program: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """Of two jobs, one waits here until the other has begun; what needs a step runs after it, whatever is free."""
    first, second, third = (tmp_path / name for name in "abc")
    steps = [
        Step("join a", ["join", str(first)], first),
        Step("use a", ["join", str(second), str(first)], second),
        Step("join c", ["join", str(third)], third),
    ]
    other = (
        f'case "$4" in {first}) until [ -d {third} ]; do sleep 0.05; done;; {second}) [ -d {first} ] || exit 7;; esac'
    )
    program(f'{other}; echo "makes $4"; mkdir "$4"')
    run(iter(steps), tmp_path / RECORD, jobs=2)
    ended = [line["step"] for line in read_record(tmp_path / RECORD)]
    assert sorted(ended[:2]) == ["join a", "join c"] and ended[2:] == ["use a"]
    assert "makes" not in capfd.readouterr().out
    assert (tmp_path / "logs" / "join-a.log").read_text() == f"makes {first}\n"


def test_what_the_recipe_can_do_at_once(tmp_path: Path) -> None:
    """Language model and picture side, and later the projection alone, need nothing of each other."""
    waiting, at_once = list(recipe(tmp_path, 0)), []
    while waiting:
        at_once.append([step.title for step in ready(waiting, [])])
        waiting = [step for step in waiting if step.title not in at_once[-1]]
    assert at_once[:3] == [["draw the world"], ["begin llm", "begin blip2"], ["train llm", "train vision"]]
    assert ["join stage2", "join alone"] in at_once


def test_a_training_that_was_stopped_goes_on(tmp_path: Path, program: Callable[[str], None]) -> None:
    """It leaves a model as one that ended does. Its time is that of all its parts."""
    record = tmp_path / RECORD
    program('mkdir -p "$4"; [ "$3" = init ] || exit 143')
    with pytest.raises(UserError, match="train b: ended with 143; the same line again goes on"):
        run(iter(steps_of(tmp_path)), record)
    program("exit 0")
    run(iter(steps_of(tmp_path)), record)
    assert [(line["step"], line["code"]) for line in read_record(record)][1:] == [("train b", 143), ("train b", 0)]


def test_an_interrupted_step_is_waited_for(tmp_path: Path) -> None:
    """Ctrl-C reaches a training too, which then saves: whoever started it must not kill it meanwhile."""
    slow = "import signal, sys, time, pathlib\n"
    slow += "stop = lambda *_: (time.sleep(1), pathlib.Path(sys.argv[4]).mkdir(), sys.exit(130))\n"
    slow += "signal.signal(signal.SIGINT, stop)\npathlib.Path(sys.argv[4] + '.begun').touch()\ntime.sleep(60)\n"
    (tmp_path / "program").write_text(f"#!{sys.executable}\n{slow}")
    (tmp_path / "program").chmod(0o755)
    outer = (
        "import sys, pathlib\nfrom mgpt4_jax import tiny\n"
        "sys.executable = sys.argv[1] + '/program'\n"
        "tiny.recipe = lambda out, seed: iter([tiny.Step('train b', ['train', str(out / 'b')], out / 'b')])\n"
        "sys.argv = ['tiny', '--out', sys.argv[1]]\nsys.exit(tiny.main())\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", outer, str(tmp_path)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "b.begun").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert said.splitlines() == ["error: interrupted; the same line again goes on from here"]
    assert (tmp_path / "b").is_dir()  # it saved
    assert [(line["step"], line["code"]) for line in read_record(tmp_path / RECORD)] == [("train b", 130)]


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs, out = tmp_path / "configs", tmp_path / "out"
    out.mkdir()
    configs.mkdir()
    (configs / "llm.yaml").write_text("steps: 1\n")
    monkeypatch.setattr(tiny, "CONFIGS", configs)
    same_recipe(out, 1)
    same_recipe(out, 1)
    with pytest.raises(UserError, match="was begun with --seed 1; give that again, or choose another --out"):
        same_recipe(out, 2)
    (configs / "llm.yaml").write_text("steps: 2\n")
    with pytest.raises(UserError, match="was begun with another configs/tiny/llm.yaml"):
        same_recipe(out, 1)


def test_a_folder_to_ship_to_that_cannot_be_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["tiny", "--out", str(tmp_path / "out"), "--ship", str(tmp_path / "file" / "x")])
    assert tiny.main() == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file' / 'x'}: Not a directory")


def test_the_most_frequent_answers() -> None:
    asked = [("size", "big"), ("size", "big"), ("size", "small"), ("count", "two")]
    found = constant_answers([{"answer_type": kind, "answer": answer} for kind, answer in asked])
    assert found == {"exact_match": 75.0, "exact_match_size": pytest.approx(200 / 3), "exact_match_count": 100.0}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run with scores and exported files, written by hand."""
    out = tmp_path / "run"
    scores = {
        "test-pairs_0": {"itc_txt_r1": 90.0, "itc_img_r1": 91.0, "txt_r1": 92.0, "img_r1": 93.0},
        "test-pairs_1": {"itc_txt_r1": 92.0, "itc_img_r1": 91.0, "txt_r1": 92.5, "img_r1": 97.0},
        "test-finetune-questions": {"exact_match": 96.123, "exact_match_size": 99.0, "items": 4},
        "test-in-words-captions": {"exact_match": 1.0, "named": 98.0},
    }
    for name, values in scores.items():
        (out / "scores" / name).mkdir(parents=True)
        (out / "scores" / name / "scores.json").write_text(json.dumps(values))
    for source in SHIPPED.values():
        path = out / "files" / source
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    lines = [("train llm", 60.0, 143), ("train llm", 41.5, 0), ("train talk", 7.0, 0)]
    record = [json.dumps({"step": step, "seconds": seconds, "code": code}) for step, seconds, code in lines]
    (out / RECORD).write_text("\n".join(record) + "\n")
    return out


def test_figures_are_means_and_named_by_what_was_asked(finished: Path) -> None:
    assert figures(finished) == {
        "test/itc_txt_r1": 91.0,
        "test/itc_img_r1": 91.0,
        "test/txt_r1": 92.25,
        "test/img_r1": 95.0,
        "test/finetune-questions/exact_match": 96.12,
        "test/finetune-questions/exact_match_size": 99.0,
        "test/in-words-captions/named": 98.0,
    }


def test_what_is_shipped(finished: Path, tmp_path: Path) -> None:
    manifest = json.loads(ship(finished, tmp_path / "to", seed=3, command="make tiny").read_text())
    assert (manifest["seed"], manifest["command"]) == (3, "make tiny")
    assert manifest["seconds"] == {"train llm": 101.5, "train talk": 7.0}
    assert manifest["figures"] == figures(finished)
    for name, source in SHIPPED.items():
        copied = (tmp_path / "to" / name).read_bytes()
        assert copied == source.encode() and manifest["files"][name]["sha256"] == hashlib.sha256(copied).hexdigest()
    (finished / "files" / "stage1" / "eva_vit_g.pth").unlink()
    with pytest.raises(UserError, match="eva_vit_g.pth: is not there; run the recipe to its end first"):
        ship(finished, tmp_path / "again", seed=3, command="make tiny")
