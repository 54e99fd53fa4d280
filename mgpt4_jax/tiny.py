"""make tiny: the whole recipe in small, from nothing to a MiniGPT-4 that answers about drawn pictures.

Every step is a command of the program, printed before it runs. A step that came to its end is passed over, and a
training that was stopped goes on: so the same line again goes on with the recipe.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from mgpt4_jax.data.page_shell import write_whole
from mgpt4_jax.data.shapes_words import DESCRIBE
from mgpt4_jax.errors import UserError
from mgpt4_jax.tiny_report import RECORD, figures, read_record, ship

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "tiny"
TEMPLATE = "vicuna_v0"
INTERRUPTED = 130  # as shells say it
PLACES = "3"  # quieter, and the language model never finds where a thing was; louder, and matching learns slowly
RANKED_AGAIN = ("--k", "16", "--similarity-weight", "20")
"""Of 100, 16 by ITM: what ITC ranks behind them is not what was asked for. Both logits count: 20 is about one over the
temperature that stage 1 comes to, .045 to .049."""


class Step(NamedTuple):
    """``words`` of `mgpt4` make ``result``."""

    title: str
    words: list[str]
    result: Path


def recipe(out: Path, seed: int) -> Iterator[Step]:
    """The steps in their order. ``out/files`` are the trained weights in the layouts of the original programs."""
    world, files, models = out / "world", out / "files", out / "models"

    def train(stage: str, model: Path, *sources: str, weights: tuple[float, ...] = ()) -> Step:
        kinds = [{"kind": "jsonl", "path": str(world / source)} for source in sources]
        data = [kind | {"weight": weight} for kind, weight in zip(kinds, weights, strict=True)] if weights else kinds
        words = ["train", "--config", str(CONFIGS / f"{stage.split('-')[0]}.yaml"), "--model", str(model)]
        words += ["--run", str(out / stage), "--seed", str(seed), "--data.train", json.dumps(data)]
        return Step(f"train {stage}", words, out / stage / "model")

    def begin(part: str, *options: str) -> Step:
        words = ["init", "--config", str(CONFIGS / "models" / f"{part}.yaml"), "--out", str(models / part)]
        return Step(f"begin {part}", [*words, "--seed", str(seed), *options], models / part)

    def export(model: Path, layout: str, to: Path) -> Step:
        return Step(f"export {to.name}", ["export", str(model), "--format", layout, "--out", str(to)], to)

    def join(name: str, qformer: str, draw: int) -> Step:
        """Vision, Q-Former and language model, with a projection that begins random."""
        words = ["convert", "--vit", str(files / "stage1" / "eva_vit_g.pth")]
        words += ["--qformer", str(files / qformer / "blip2_pretrained.pth")]
        words += ["--llm", str(files / "llm"), "--template", TEMPLATE]
        words += ["--overrides", str(CONFIGS / "overrides.yaml"), "--out", str(models / name)]
        words += ["--seed", str(2 * seed + draw)]
        return Step(f"join {name}", words, models / name)

    yield Step("draw the world", ["data", "shapes", "--out", str(world), "--seed", str(seed)], world)
    yield begin("llm", "--tokenizer", str(world / "tokenizer"), "--template", TEMPLATE)
    yield train("llm", models / "llm", "statements.jsonl")
    yield train("talk", out / "llm" / "model", "statements.jsonl", "talks.jsonl", weights=(1, 3))
    texts = ("told_facts.jsonl", "chats.jsonl", "statements.jsonl", "talks.jsonl")
    yield train("chat", out / "talk" / "model", *texts, weights=(2, 2, 1, 1))
    yield export(out / "chat" / "model", "hf", files / "llm")
    yield begin("blip2", "--qformer-tokenizer", str(world / "qformer_tokenizer"), "--places", PLACES)
    yield train("vision", models / "blip2", "singles.jsonl")
    yield train("stage1", out / "vision" / "model", "pairs.jsonl")
    yield export(out / "stage1" / "model", "lavis", files / "stage1")
    yield join("stage2", "stage1", 0)
    yield train("stage2", models / "stage2", "pairs.jsonl", "facts.jsonl")
    yield export(out / "stage2" / "model", "lavis", files / "stage2")
    yield join("align", "stage2", 1)  # not the projection that it grew up with
    yield train("align", models / "align", "pairs.jsonl", "facts.jsonl")
    yield train("finetune", out / "align" / "model", "curated.jsonl")
    yield export(out / "finetune" / "model", "minigpt4", files / "pretrained_minigpt4.pth")
    # What one projection reaches alone, without BLIP-2's stage 2 before it:
    yield join("alone", "stage1", 1)
    yield train("align-alone", models / "alone", "pairs.jsonl", "facts.jsonl")


def evaluations(out: Path) -> Iterator[Step]:
    """What is measured: retrieval, captions and questions, each beside the picture-blind and the upper bound."""
    world, scores = out / "world", out / "scores"

    def measure(name: str, model: Path, task: str, data: Path, *options: str) -> Step:
        words = ["eval", str(model), "--task", task, "--data", str(data), "--out", str(scores / name), *options]
        return Step(f"measure {name}", words, scores / name / "scores.json")

    def answers(part: str, stage: str, images: str = "images") -> Iterator[Step]:
        model, folder = out / stage / "model", world / part
        where = ("--images", str(folder / images))
        name = f"{part}-{stage}" + ("" if images == "images" else f"-{images}")
        yield measure(f"{name}-questions", model, "vqa", folder / "questions.json", *where, "--prompt", "{}")
        words = ("--prompt", DESCRIBE[0], "--max-new-tokens", "64")
        yield measure(f"{name}-captions", model, "caption", folder / "captions.json", *where, *words)

    for part in ("test", "unseen"):
        for stage in ("align", "finetune", "align-alone"):
            yield from answers(part, stage)
        images = ("--images", str(world / part / "images"))
        for path in sorted((world / part).glob("pairs_*.json")):
            yield measure(f"{part}-{path.stem}", out / "stage1" / "model", "retrieval", path, *images, *RANKED_AGAIN)
    for stage in ("align", "finetune"):
        yield from answers("test", stage, "blind")
    words = ("--prompt", "{}", "--template", "none", "--stop", "###", "--max-new-tokens", "64")
    for kind in ("questions", "captions"):
        told = world / "test" / f"{kind}_in_words.json"
        yield measure(f"test-in-words-{kind}", out / "chat" / "model", "vqa", told, *words)


def same_recipe(out: Path, seed: int) -> None:
    """What lies in ``out`` was begun with this seed and these configurations, or nothing does yet.

    Raises:
      UserError: it was not, so that passing over its steps would mix two recipes.
    """
    now = {"seed": seed} | {
        path.relative_to(CONFIGS).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(CONFIGS.rglob("*.yaml"))
    }
    path = out / "recipe.json"
    if not path.exists():
        write_whole(path, json.dumps(now, indent=1) + "\n")
        return
    begun = json.loads(path.read_text())
    if altered := [name for name in now if now[name] != begun.get(name)]:
        what = f"--seed {begun['seed']}" if altered[0] == "seed" else f"another configs/tiny/{altered[0]}"
        raise UserError(f"{out}: was begun with {what}; give that again, or choose another --out")


def run(steps: Iterable[Step], record: Path, jobs: int = 1) -> None:
    """Run what did not come to its end yet, up to ``jobs`` steps at once; ``record`` gets how each ended, and when.

    A result that is there is whole; only of a training it does not tell the end: one that was stopped leaves a model.
    """
    done = {line["step"] for line in read_record(record) if line["code"] == 0}
    waiting = [
        step for step in steps if not (step.result.exists() and (step.title in done or step.words[0] != "train"))
    ]
    running: dict[Future[None], Step] = {}
    with ThreadPoolExecutor(jobs) as pool:  # whose end is that of every step that began
        while waiting or running:
            for step in ready(waiting, list(running.values()))[: jobs - len(running)]:
                waiting.remove(step)
                running[pool.submit(_perform, step, record, quiet=jobs > 1)] = step
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                future.result()


def ready(waiting: list[Step], running: list[Step]) -> list[Step]:
    """Those of ``waiting`` that name no result of a step before them that has not ended."""
    return [
        step
        for at, step in enumerate(waiting)
        if not any(str(other.result) in word for other in (*running, *waiting[:at]) for word in step.words)
    ]


def _perform(step: Step, record: Path, *, quiet: bool) -> None:
    """Run one step; if ``quiet``, what it prints goes to a file beside ``record``.

    Raises:
      UserError: it did not come to its end.
    """
    log = record.parent / "logs" / f"{step.title.replace(' ', '-')}.log"
    where = f" ({log})" if quiet else ""
    print(f"\n== {step.title}{where}\n$ mgpt4 {shlex.join(step.words)}", flush=True)
    start = time.monotonic()
    if quiet:
        log.parent.mkdir(exist_ok=True)
    with log.open("a") if quiet else nullcontext() as output:
        child = subprocess.Popen([sys.executable, "-m", "mgpt4_jax.cli", *step.words], stdout=output, stderr=output)
        code = child.wait()  # Ctrl-C reaches it as well: a training saves before it ends
    seconds = round(time.monotonic() - start, 1)
    with record.open("a") as file:
        file.write(json.dumps({"step": step.title, "seconds": seconds, "code": code}) + "\n")
    if code:
        raise UserError(f"{step.title}: ended with {code}{where}; the same line again goes on from here")
    if quiet:
        print(f"\n== {step.title}: done after {seconds:.0f} seconds", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make tiny ARGS=...", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="where everything goes (runs/tiny)")
    parser.add_argument("--seed", type=int, default=0, help="of the world, the first weights and the runs (0)")
    parser.add_argument("--jobs", type=int, default=1, help="steps at once: 2 where there are two cores (1)")
    parser.add_argument("--ship", type=Path, help="copy the exported files there, with their manifest")
    arguments = parser.parse_args()
    out, seed = arguments.out, arguments.seed
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: must be 1 or more")
    try:
        for folder in filter(None, (out, arguments.ship)):  # said now, not after an hour
            folder.mkdir(parents=True, exist_ok=True)
        same_recipe(out, seed)
        run(recipe(out, seed), out / RECORD, arguments.jobs)
        run(evaluations(out), out / RECORD, arguments.jobs)
        print(json.dumps(figures(out), indent=1))
        if arguments.ship is not None:
            print(ship(out, arguments.ship, seed=seed, command=f"make tiny ARGS='--seed {seed}'"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; choose another folder", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same line again goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
