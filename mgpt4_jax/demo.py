"""make demo: the whole path on tiny files, in the layouts that the published weights have.

Every step is a command of the program, printed before it runs, so that what one sees is what one types.
The weights are random (a few hundred kilobytes, in ``tests/golden/data``): the answers are babble, the
proof is not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from mgpt4_jax import cli

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "data"
CASE = GOLDEN / "minigpt4_vicuna"
TINY = ROOT / "configs" / "tiny_overrides.yaml"

SOURCES = {
    "--vit": CASE / "eva_vit_g.pth",
    "--qformer": CASE / "blip2_pretrained_flant5xxl.pth",
    "--llm": CASE / "llm",
    "--projection": CASE / "pretrained_minigpt4.pth",
}
QUESTIONS = [
    ("image_0.png", "What is in the picture?"),
    ("image_1.png", "Describe this image in detail."),
    ("image_2.png", "What is this?"),
    (["image_0.png", "image_2.png"], "What changed from <ImageHere> to <ImageHere>?"),
]
NEXT = """
With the published weights (README.md says which files they are), the commands are

  mgpt4 convert --vit eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth \\
                --llm vicuna-7b --projection pretrained_minigpt4_7b.pth --out models/minigpt4-7b
  mgpt4 verify models/minigpt4-7b --vit eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth \\
                --llm vicuna-7b --projection pretrained_minigpt4_7b.pth
  mgpt4 chat models/minigpt4-7b --image cat.jpg
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo ARGS=...", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".demo", help="where the model and the answers go")
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    model = out / "minigpt4-tiny"
    files = [part for option, path in SOURCES.items() for part in (option, shown(path))]

    heading("1. What are these files?")
    for path in SOURCES.values():
        run("inspect", shown(path))
    heading("2. Convert them to one model directory")
    run("convert", *files, "--overrides", shown(TINY), "--out", shown(model))
    heading("3. Prove that nothing changed: PyTorch beside JAX, layer by layer")
    run("verify", shown(model), *files)
    heading("4. Ask about pictures, all in one batch")
    questions, answers = write_questions(out / "questions.jsonl"), out / "answers.jsonl"
    run("generate", shown(model), "--input", shown(questions), "--output", shown(answers))
    show_answers(answers)
    print(NEXT)


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m\n" if sys.stdout.isatty() else f"\n== {text}\n", flush=True)


def run(*arguments: str) -> None:
    print("$ mgpt4 " + " ".join(arguments), flush=True)
    if code := cli.main(list(arguments)):
        raise SystemExit(code)
    print(flush=True)


def shown(path: Path) -> str:
    """Relative to where one stands, if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def write_questions(path: Path) -> Path:
    with path.open("w") as file:
        for number, (images, prompt) in enumerate(QUESTIONS, start=1):
            names = [images] if isinstance(images, str) else images
            paths = [str(GOLDEN / "preprocess" / name) for name in names]
            file.write(json.dumps({"id": number, "image": paths, "prompt": prompt, "max_new_tokens": 12}) + "\n")
    return path


def show_answers(path: Path) -> None:
    for answer, (images, prompt) in zip(map(json.loads, path.read_text().splitlines()), QUESTIONS, strict=True):
        print(f"  {images}: {prompt}\n    -> {answer['text']!r} ({answer['finish_reason']})")


if __name__ == "__main__":
    main()
