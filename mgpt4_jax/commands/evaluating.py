"""``mgpt4 eval``: captions, answers and retrieval, scored as the benchmarks do."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.table import Table

from mgpt4_jax.commands import Commands, console
from mgpt4_jax.commands.answering import _add_loading, _add_sampling, _load, _sampling
from mgpt4_jax.errors import UserError
from mgpt4_jax.progress import progress

TASKS = ("caption", "vqa", "retrieval")


def _add_eval(parser: ArgumentParser) -> None:
    _add_loading(parser)
    parser.add_argument("--task", choices=TASKS, required=True, help="what is evaluated")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="the benchmark's JSON: COCO captions, VQA or GQA questions, LAVIS's lists",
    )
    parser.add_argument(
        "--annotations", type=Path, help="the answers of VQAv2 or OK-VQA, if they are a file of their own"
    )
    parser.add_argument("--images", type=Path, help="the folder of the pictures (that of --data)")
    parser.add_argument(
        "--image-name", default="{}.jpg", help="a picture's file by its id ({}.jpg): 'COCO_val2014_{:012d}.jpg'"
    )
    parser.add_argument("--out", type=Path, required=True, help="a directory; a second run goes on in it")
    parser.add_argument("--prompt", help="'a photo of' or 'Question: {} Short answer:', where {} is the question")
    parser.add_argument("--k", type=int, default=128, help="of retrieval: how many of each row are matched (128)")
    parser.add_argument("--examples", type=int, default=24, help="on the page (24)")
    parser.add_argument("--slots", type=int, help="rows decoded together, a power of two (8 on a CPU, else 32)")
    _add_sampling(parser, temperature="0", top_p="1", penalty="1")


def _eval(arguments: Namespace) -> int:
    for name in ("k", "examples"):
        if arguments[name] < 1:
            raise UserError(f"--{name} must be at least 1, got {arguments[name]}")
    images = arguments.images or arguments.data.parent
    scores, failed = (_retrieve if arguments.task == "retrieval" else _answer)(arguments, images)
    table = Table("metric", "value")
    for name, value in scores.items():
        table.add_row(name, f"{value:.4g}")
    console().print(table if scores else "no references: nothing to score")
    print(f"look at {arguments.out / 'page.html'}")
    if failed:
        print(f"{failed} failed: see finish_reason error in {arguments.out / 'answers.jsonl'}", file=sys.stderr)
    return 1 if failed else 0


def _settings(arguments: Namespace, **others: Any) -> dict[str, Any]:
    """What makes an evaluation the same one: also what its files hold, and when the model was written."""
    names = ("model", "task", "data", "annotations", "image_name", "dtype")
    files = [path for path in (arguments.data, arguments.annotations) if path is not None]
    return {
        **{name: None if arguments[name] is None else str(arguments[name]) for name in names},
        "data_sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
        "model_written_ns": (arguments.model / "model.json").stat().st_mtime_ns,
        **others,
    }


def _answer(arguments: Namespace, images: Path) -> tuple[dict[str, float], int]:
    from mgpt4_jax.data.prompts import get_template
    from mgpt4_jax.evaluate.run import open_directory, run_answers
    from mgpt4_jax.evaluate.tasks import PROMPTS, read_captions, read_questions
    from mgpt4_jax.generate.sampling import SamplingParams

    task = arguments.task
    if task == "caption":
        items = read_captions(arguments.data, images)
    else:
        items = read_questions(arguments.data, arguments.annotations, images, arguments.image_name)
    prompt = PROMPTS[task] if arguments.prompt is None else arguments.prompt
    sampling = _sampling(arguments, SamplingParams(max_new_tokens=30 if task == "caption" else 10))
    template = get_template(arguments.template) if arguments.template else None
    asked = {"prompt": prompt, "template": arguments.template, "sampling": dataclasses.asdict(sampling)}
    settings = _settings(arguments, images=str(images), items=len(items), **asked)
    model = _load(arguments, arguments.slots)
    open_directory(arguments.out, settings)
    with progress("answering") as report:
        return run_answers(
            model.answerer,
            task,
            items,
            arguments.out,
            prompt=prompt,
            sampling=sampling,
            template=template,
            examples=arguments.examples,
            report=report,
        )


def _retrieve(arguments: Namespace, images: Path) -> tuple[dict[str, float], int]:
    from mgpt4_jax.api import RetrievalModel, load
    from mgpt4_jax.checkpoint import read_manifest
    from mgpt4_jax.evaluate.retrieval import Retriever
    from mgpt4_jax.evaluate.run import open_directory, run_retrieval
    from mgpt4_jax.evaluate.tasks import read_pairs
    from mgpt4_jax.sharding import make_mesh

    kind = read_manifest(arguments.model).config.architecture
    if kind != "blip2":
        raise UserError(f"{arguments.model}: a {kind} model retrieves nothing; take one of BLIP-2 stage 1")
    pairs = read_pairs(arguments.data, images)
    counts = {"num_images": len(pairs.images), "num_texts": len(pairs.texts)}
    model = load(arguments.model, mesh=arguments.mesh, dtype=arguments.dtype)
    assert isinstance(model, RetrievalModel)
    assert model.tokenizer is not None  # `load` asks for it
    mesh = make_mesh(arguments.mesh) if arguments.mesh else None
    retriever = Retriever(model.config, model.params, model.tokenizer, dtype=model.dtype, mesh=mesh)
    open_directory(arguments.out, _settings(arguments, images=str(images), k=arguments.k, **counts))
    with progress("retrieving") as report:
        scores = run_retrieval(
            retriever, pairs, arguments.out, k=arguments.k, examples=arguments.examples, report=report
        )
    return scores, 0


COMMANDS: Commands = {
    "eval": (
        _eval,
        _add_eval,
        "Measure a model on a benchmark: captions, answers to questions, retrieval.",
        "mgpt4 eval models/minigpt4-7b --task caption --data captions_val2014.json --images val2014 --out runs/coco\n"
        "  mgpt4 eval models/blip2 --task retrieval --data flickr30k_test.json --images flickr30k --out runs/flickr",
    ),
}
