"""The program: exit codes, one line for an error, help that is quick, and answers from the command line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mgpt4_jax import cli
from tests.generate.conftest import model_dir, pictures  # noqa: F401  (fixtures)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_shows_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert leaving.value.code == 0
    assert f"mgpt4 {command}" in out and "example:" in out


def test_help_does_not_import_jax() -> None:
    program = (
        "import sys; from mgpt4_jax import cli\ntry: cli.main(['--help'])\nfinally: sys.exit('jax' in sys.modules)"
    )
    start = time.monotonic()
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "generate" in finished.stdout
    assert time.monotonic() - start < 10  # under a second on an idle machine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["dance"], "dance"),
        (["generate"], "model"),
        (["generate", "nowhere", "--input", "x", "--output", "y", "--top-q", "1"], "top-q"),
        (["generate", "nowhere", "--input", "x", "--output", "y", "--temperature", "warm"], "temperature"),
        (["generate", "nowhere", "--input", "x", "--output", "y", "--temperature", "-1"], "temperature must be"),
        (["generate", "nowhere", "--input", "x", "--output", "y", "--num-beams", "0"], "num_beams must be"),
        (["generate", "nowhere", "--input", "x", "--output", "y", "--early-stopping", "soon"], "early-stopping"),
        (["generate", "nowhere", "--input", "x", "--output", "y", "--template", "llama9"], "unknown template"),
        (["generate", "nowhere", "--input", "x.jsonl", "--output", "y"], "x.jsonl: cannot be read"),
        (["generate", "nowhere", "--input", "/dev/null", "--output", "y"], "model.json"),
        (["chat", "nowhere"], "model.json"),
        (["chat", "nowhere", "--top-p", "2"], "top_p must be"),
    ],
)
def test_errors_are_one_line_and_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "chat", "nowhere", "--debug")
    assert code == 2 and "Traceback" in err


def test_generate_answers_and_resumes(
    capsys: pytest.CaptureFixture[str],
    model_dir: Path,  # noqa: F811
    pictures: list[Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    questions, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": i, "prompt": "What is it?", "image": path.name} for i, path in enumerate(pictures)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("generate", model_dir, "--input", questions, "--output", answers, "--max-new-tokens", 5)
    code, out, err = run(capsys, *command)
    assert (code, out) == (0, "")
    assert "memory per device (float32)" in err and "3 answered" in err
    whole = answers.read_bytes()
    assert [json.loads(line)["id"] for line in whole.splitlines()] == [0, 1, 2]
    code, _, err = run(capsys, *command, "--dtype", "float32", "--slots", 2)
    assert code == 0 and "3 there already" in err and answers.read_bytes() == whole
    with questions.open("a") as file:
        file.write("bad\n")
    code, _, err = run(capsys, *command)
    assert code == 1 and "1 failed" in err


def test_generate_refuses_before_it_loads(
    capsys: pytest.CaptureFixture[str],
    model_dir: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    questions = tmp_path / "in.jsonl"
    questions.write_text('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n')
    code, _, err = run(capsys, "generate", model_dir, "--input", questions, "--output", tmp_path / "out.jsonl")
    assert code == 2 and "in.jsonl:2" in err and "memory" not in err
    assert not (tmp_path / "out.jsonl").exists()


def test_an_interrupt_is_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mgpt4_jax.generate.batch.check_ids", interrupt)
    code, _, err = run(capsys, "generate", "model", "--input", tmp_path / "x", "--output", tmp_path / "y")
    assert (code, err) == (130, "error: interrupted\n")


def test_chat_over_a_pipe(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model_dir: Path,  # noqa: F811
    pictures: list[Path],  # noqa: F811
) -> None:
    script = f"What is it?\n/image {pictures[1]}\n/image gone.png\n/help\nAnd this?\n/reset\nHm?\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(script))
    code, out, err = run(
        capsys, "chat", model_dir, "--image", pictures[0], "--temperature", "0", "--max-new-tokens", "4"
    )
    assert code == 0
    assert "error: gone.png" in err and "/reset forgets" in err
    assert out.count("\n") >= 3 and "never" not in out
