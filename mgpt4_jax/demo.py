"""make demo: the whole path on the small models of ``tiny/``, which lie in the layouts that the published ones have.

Every step is a command of the program, printed before it runs, so that what one sees is what one types. The end is one
page, ``.demo/page.html``: pictures never seen with their answers, what a search found, a run, and the proof.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgpt4_jax import cli
from mgpt4_jax.demo_page import Answer, Findings, Query, write_page
from mgpt4_jax.demo_questions import choose_queries, choose_questions, judge, read_hits, steps_done
from mgpt4_jax.errors import UserError
from mgpt4_jax.tiny import CONFIGS, ROOT, TEMPLATE
from mgpt4_jax.tiny_report import MANIFEST, SHIPPED, sources

MARK = ".made-by-make-demo"  # a folder with it may be replaced
SEED = 20_26  # of the pictures; whatever it is, no scene of their test part was learnt from
WORLD = {"--texts": 200, "--singles": 10, "--pairs": 60, "--curated": 2000, "--test": 60, "--questions": 30}
STEPS = 200
DEVICES = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
SHORT = ("--max-new-tokens", "8")
NEXT = """
With the published weights (README.md says which files they are), the commands are

  mgpt4 convert --vit eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth \\
                --llm vicuna-7b --projection pretrained_minigpt4_7b.pth --out models/minigpt4-7b
  mgpt4 verify models/minigpt4-7b --vit eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth \\
                --llm vicuna-7b --projection pretrained_minigpt4_7b.pth
  mgpt4 chat models/minigpt4-7b --image cat.jpg
"""
OWN_PICTURE = """\
The small model talks about your own picture too, of at most three coloured shapes on white or light grey:

  mgpt4 chat {model} --image my.png --temperature 0
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; its exit code is 0 only if every step succeeded."""
    parser = argparse.ArgumentParser(prog="make demo ARGS=...", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--weights", type=Path, default=ROOT / "tiny", help="or the folder that `make tiny ARGS='--ship DIR'` wrote"
    )
    parser.add_argument("--out", type=Path, default=ROOT / ".demo", help="where everything goes (.demo)")
    options = parser.parse_args(argv)
    try:
        Demo(options.weights.absolute(), options.out.absolute()).run_all()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; run it again to begin anew", file=sys.stderr)
        return 130
    return 0


def read_manifest(weights: Path) -> Mapping[str, Any]:
    """The manifest beside the weights, or {} if there is none, after a look at the files.

    Raises:
      UserError: a file is missing, or is not the one that the manifest names.
    """
    for name in SHIPPED:
        if not (weights / name).is_file():
            raise UserError(f"{weights / name}: is missing; `make tiny ARGS='--ship DIR'` writes such a folder")
    path = weights / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest: Mapping[str, Any] = json.loads(path.read_text())
        hashes = {name: about["sha256"] for name, about in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no manifest of weights ({error!r}); restore it from the repository") from error
    for name, expected in hashes.items():
        file = weights / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise UserError(f"{file}: is not the file that {path.name} names; restore it from the repository")
    return manifest


def make_room(out: Path) -> None:
    """An empty folder, in the place of an older demo's.

    Raises:
      UserError: something else is there, or nothing can be written.
    """
    if out.exists() and out != ROOT / ".demo" and not (out / MARK).is_file():
        raise UserError(f"{out}: exists and is not of an earlier demo; choose another --out")
    try:
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        (out / MARK).touch()
    except OSError as error:
        raise UserError(f"{out}: cannot be replaced ({error.strerror or error}); choose another --out") from error


class Demo:
    """The steps in their order; each prints and runs commands, and keeps what the page shows."""

    def __init__(self, weights: Path, out: Path):
        self.out, self.world, self.test = out, out / "world", out / "world" / "test"
        self.model, self.retrieval = out / "minigpt4-tiny", out / "blip2-tiny"
        self.start = time.monotonic()
        self.commands: list[str] = []
        self.manifest = read_manifest(weights)
        self.tokenizer = weights / "qformer_tokenizer"
        self.whole, self.pairs = sources(weights)
        self.parts = {option: path for option, path in self.whole.items() if option != "--projection"}

    def run_all(self) -> None:
        make_room(self.out)
        heading("1. What are these files? Convert them, and prove that nothing changed: PyTorch beside JAX")
        verified = self.convert()
        heading("2. Ask about pictures never seen, all in one batch")
        self.run("data", "shapes", "--out", self.world, "--seed", SEED, *options(WORLD))
        answers = self.ask()
        heading("3. Find pictures by words")
        queries = self.search()
        heading("4. Train a new projection on four simulated devices; stop it in the middle; go on")
        scores, stopped_at = self.train()
        heading("5. One page of it all")
        found = Findings(
            answers=answers,
            queries=queries,
            verified=verified,
            scores=scores,
            curves=self.out / "run" / "curves.png",
            stopped_at=stopped_at,
            steps=STEPS,
            among=WORLD["--test"],
            seconds=time.monotonic() - self.start,
            commands=self.commands,
            manifest=self.manifest,
        )
        page = self.out / "page.html"
        write_page(page, found)
        print(f"It took {found.seconds:.0f} s. Look at {shown(page)}")
        print(NEXT, OWN_PICTURE.format(model=shown(self.model)), sep="\n")

    # -- the steps ------------------------------------------------------------------------------

    def convert(self) -> dict[str, Mapping[str, Any]]:
        for path in (*self.whole.values(), self.pairs["--qformer"]):
            self.run("inspect", path)
        known = ("--overrides", CONFIGS / "overrides.yaml")
        talks = ("--template", TEMPLATE)
        reads = ("--qformer-tokenizer", self.tokenizer)
        self.run("convert", *options(self.whole), *known, *talks, "--out", self.model)
        self.run("convert", *options(self.pairs), *known, *reads, "--out", self.retrieval)
        verified = {}
        for model, given in ((self.model, self.whole), (self.retrieval, self.pairs)):
            table = self.out / f"verify-{model.name}.json"
            self.run("verify", model, *options(given), "--json", table)
            verified[model.name] = json.loads(table.read_text())
        return verified

    def ask(self) -> list[Answer]:
        """Some questions of each kind and two descriptions, of different pictures."""
        asked = choose_questions(self.read("questions.json"), self.read("captions.json"))
        questions, output = self.out / "questions.jsonl", self.out / "answers.jsonl"
        lines = [
            {"id": number, "image": str(self.test / "images" / one["image"]), "prompt": one["question"]}
            for number, one in enumerate(asked)
        ]
        questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = ("--slots", 16, "--max-new-tokens", 64)
        self.run("generate", self.model, "--input", questions, "--output", output, *words)
        texts = {line["id"]: line["text"] for line in map(json.loads, output.read_text().splitlines())}
        answers = [judge(self.test, one, texts[number]) for number, one in enumerate(asked)]
        for answer in answers:
            truth = "" if answer.is_right else f"   (right: {answer.truth})"
            print(f"  {'✓' if answer.is_right else '✗'} {answer.image.name}: {answer.question} {answer.text}{truth}")
        return answers

    def search(self) -> list[Query]:
        index, found = self.out / "pictures.index", []
        self.run("search", self.retrieval, "--index", index, "--add", self.test / "images")
        for text, right in choose_queries(self.read("captions.json")):
            printed = self.run("search", self.retrieval, "--index", index, text, "-k", 4, is_read=True)
            found.append(read_hits(printed, text, right))
        return found

    def train(self) -> tuple[dict[str, Mapping[str, float]], int]:
        """The scores before, after and of the shipped weights; and the step at which the run was stopped.

        What is reached without seeing stands beside them: shown the mean of many pictures, whatever the question.
        """
        begin, run, known = self.out / "new-projection", self.out / "run", ("--overrides", CONFIGS / "overrides.yaml")
        new = ("--template", TEMPLATE, "--seed", SEED)  # not the projection that the Q-Former grew up with
        self.run("convert", *options(self.parts), *known, *new, "--out", begin)
        before = self.measure(begin, "before")
        source = json.dumps([{"kind": "jsonl", "path": shown(self.world / "curated.jsonl")}])
        words = ["train", "--config", CONFIGS / "finetune.yaml", "--model", begin, "--run", run]
        words += ["--mesh", "data=4", "--data.train", source, "--steps_per_epoch", STEPS]
        words += ["--optim.peak_lr", "5e-3", "--log.every", 5]
        log = run / "log.jsonl"
        self.run_apart(words, log, stop_at=STEPS // 2)
        stopped_at = steps_done(log)
        self.run_apart(words, log)
        after = self.measure(run / "model", "after")
        blind = self.measure(run / "model", "blind", "blind")
        shipped = self.measure(self.model, "shipped")
        scores = {"before": before, f"after {STEPS} steps": after, "after, not seeing": blind, "shipped": shipped}
        return scores, stopped_at

    def measure(self, model: Path, name: str, images: str = "images") -> Mapping[str, float]:
        out, data = self.out / f"scores-{name}", ("--data", self.test / "questions.json")
        where = ("--images", self.test / images)
        self.run("eval", model, "--task", "vqa", *data, *where, "--prompt", "{}", *SHORT, "--out", out)
        scores: Mapping[str, float] = json.loads((out / "scores.json").read_text())
        return scores

    def read(self, name: str) -> list[Any]:
        found: list[Any] = json.loads((self.test / name).read_text())
        return found

    # -- commands -------------------------------------------------------------------------------

    def run(self, *arguments: object, is_read: bool = False) -> str:
        """One command, in this process; ``is_read``: what it prints on stdout is given back, too."""
        words, heard = self.show(arguments), io.StringIO()
        with contextlib.redirect_stdout(heard) if is_read else contextlib.nullcontext():
            code = cli.main(words)
        print(heard.getvalue(), end="")
        self.check(words, code, 0)
        return heard.getvalue()

    def run_apart(self, arguments: Sequence[object], log: Path, stop_at: int | None = None) -> None:
        """A training in a process of its own, on simulated devices; SIGTERM at the step ``stop_at``."""
        words = self.show(arguments, " ".join(f"{name}={value}" for name, value in DEVICES.items()) + " ")
        environment = os.environ | DEVICES
        child = subprocess.Popen([sys.executable, "-m", "mgpt4_jax.cli", *words], env=environment)
        is_told = False
        try:
            while child.poll() is None:
                if stop_at is not None and not is_told and steps_done(log) >= stop_at:
                    print(f"\n$ kill -TERM {child.pid}   # in the middle of the run", flush=True)
                    child.send_signal(signal.SIGTERM)
                    is_told = True
                time.sleep(0.1)
        finally:
            if child.poll() is None:  # we are interrupted
                child.terminate()
                child.wait()
        self.check(words, child.returncode, 0 if stop_at is None else 128 + signal.SIGTERM)

    def show(self, arguments: Sequence[object], before: str = "") -> list[str]:
        """Print a command, and give its words."""
        words = [shown(word) if isinstance(word, Path) else str(word) for word in arguments]
        self.commands.append(f"{before}mgpt4 {shlex.join(words)}")
        print(f"$ {self.commands[-1]}", flush=True)
        return words

    def check(self, words: Sequence[str], code: int, expected: int) -> None:
        if code != expected:
            raise UserError(f"the demo ends here: `mgpt4 {words[0]}` ended with {code}, not {expected}; see above")
        print(flush=True)


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m\n" if sys.stdout.isatty() else f"\n== {text}\n", flush=True)


def shown(path: Path) -> str:
    """Relative to where one stands, if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def options(values: Mapping[str, object]) -> list[object]:
    return [word for pair in values.items() for word in pair]


if __name__ == "__main__":
    sys.exit(main())
