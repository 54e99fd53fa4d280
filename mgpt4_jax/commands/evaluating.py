"""``mgpt4 eval``: captions, answers, retrieval and perplexity, scored as the benchmarks do."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from rich.table import Table

from mgpt4_jax.commands import Commands, console
from mgpt4_jax.commands.answering import _add_loading, _add_sampling, _load, _sampling
from mgpt4_jax.errors import UserError
from mgpt4_jax.progress import progress

if TYPE_CHECKING:
    from mgpt4_jax.train_config import TrainConfig

TASKS = ("caption", "vqa", "retrieval", "perplexity")


def _add_eval(parser: ArgumentParser) -> None:
    _add_loading(parser)
    parser.add_argument("--task", choices=TASKS, required=True, help="what is evaluated")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="the benchmark's JSON: COCO captions, VQA or GQA questions, LAVIS's lists; of perplexity JSONL as "
        "training reads it",
    )
    parser.add_argument(
        "--annotations", type=Path, help="the answers of VQAv2 or OK-VQA, if they are a file of their own"
    )
    parser.add_argument("--images", type=Path, help="the folder of the pictures (that of --data)")
    parser.add_argument(
        "--image-name", default="{}.jpg", help="a picture's file by its id ({}.jpg): 'COCO_val2014_{:012d}.jpg'"
    )
    parser.add_argument("--out", type=Path, required=True, help="a directory; a second run goes on in it")
    parser.add_argument(
        "--prompt",
        help="'a photo of' or 'Question: {} Short answer:', where {} is the question; of perplexity: what stands "
        "before an answer without an instruction of its own",
    )
    parser.add_argument(
        "--rows", type=Path, help="of perplexity: a run's YAML (RUN/config.yaml), whose rows are measured exactly"
    )
    parser.add_argument("--batch-size", type=int, help="of perplexity: rows measured together (8 for each device)")
    parser.add_argument("--k", type=int, default=128, help="of retrieval: how many of each row are matched (128)")
    parser.add_argument(
        "--similarity-weight",
        type=float,
        default=1.0,
        help="of retrieval: what the similarity counts beside the matching logit (1, as LAVIS; the logit of "
        "contrast has one over the temperature)",
    )
    parser.add_argument("--examples", type=int, default=24, help="on the page (24)")
    parser.add_argument("--slots", type=int, help="rows decoded together, a power of two (8 on a CPU, else 32)")
    _add_sampling(parser, temperature="0", top_p="1", penalty="1")


def _eval(arguments: Namespace) -> int:
    for name in ("k", "examples"):
        if arguments[name] < 1:
            raise UserError(f"--{name} must be at least 1, got {arguments[name]}")
    if not 0 <= arguments.similarity_weight < float("inf"):
        raise UserError(f"--similarity-weight must be 0 or more, got {arguments.similarity_weight}")
    images = arguments.images or arguments.data.parent
    scores, failed = RUNS.get(arguments.task, _answer)(arguments, images)
    table = Table("metric", "value")
    for name, value in scores.items():
        table.add_row(name, f"{value:.4g}")
    console().print(table if scores else "no references: nothing to score")
    print(f"look at {arguments.out / 'page.html'}")
    if failed:
        lines = "losses.jsonl" if arguments.task == "perplexity" else "answers.jsonl"
        print(f"{failed} failed: each has an error in {arguments.out / lines}", file=sys.stderr)
    return 1 if failed else 0


def _settings(arguments: Namespace, **others: Any) -> dict[str, Any]:
    """What makes an evaluation the same one: what its files and the model hold, wherever they lie."""
    files = [path for path in (arguments.data, arguments.annotations, arguments.rows) if path is not None]
    return {
        **{name: arguments[name] for name in ("task", "image_name", "dtype")},
        "data_sha256": [_sha256([path]) for path in files],
        "model_sha256": _model_sha256(arguments.model),
        **others,
    }


def _model_sha256(model: Path) -> str:
    """Of ``model.json``, which names what was converted by its hash, of all other weights, and of the tokenisers."""
    from mgpt4_jax.checkpoint import read_manifest

    manifest = read_manifest(model)
    is_named = bool(manifest.sources) and manifest.base is None
    folders = ("tokenizer", "qformer_tokenizer", *(() if is_named else ("params",)))
    files = [path for name in folders for path in sorted((model / name).rglob("*")) if path.is_file()]
    return _sha256([model / "model.json", *files])


def _sha256(paths: Sequence[Path]) -> str:
    """Of what the files hold, one after the other.

    Raises:
      UserError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def _answer(arguments: Namespace, images: Path) -> tuple[dict[str, float], int]:
    from mgpt4_jax.data.prompts import get_template
    from mgpt4_jax.evaluate.run import open_directory, run_answers
    from mgpt4_jax.evaluate.tasks import PROMPTS, read_captions, read_questions, result_names
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
            names=result_names(task, arguments.data),
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
            retriever,
            pairs,
            arguments.out,
            k=arguments.k,
            weight=arguments.similarity_weight,
            examples=arguments.examples,
            report=report,
        )
    return scores, 0


def _foretell(arguments: Namespace, images: Path) -> tuple[dict[str, float], int]:
    from mgpt4_jax.evaluate.perplexity import Meter, perplexity_config, run_perplexity
    from mgpt4_jax.evaluate.run import open_directory
    from mgpt4_jax.sharding import parse_mesh

    del images  # stand beside the file, as in training
    sizes = parse_mesh(arguments.mesh)
    batch_size = 8 * sizes["data"] * sizes["fsdp"] if arguments.batch_size is None else arguments.batch_size
    config = perplexity_config(
        arguments.model,
        arguments.data,
        arguments.out,
        prompt=arguments.prompt,
        template=arguments.template,
        like=None if arguments.rows is None else _run_of(arguments.rows),
        batch_size=batch_size,
        mesh=arguments.mesh,
        dtype=arguments.dtype,
    )
    meter = Meter(config, own_instructions=arguments.rows is None)
    asked = {"prompt": arguments.prompt, "template": arguments.template}
    open_directory(arguments.out, _settings(arguments, **asked))
    with progress("measuring") as report:
        return run_perplexity(meter, arguments.out, examples=arguments.examples, report=report)


def _run_of(path: Path) -> TrainConfig:
    """The configuration of a run, of which model, data and mesh are of no account here and may be missing."""
    import yaml

    from mgpt4_jax.train_config import TrainConfig

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())[:80]})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a configuration of `mgpt4 train`")
    data = values.get("data") or {}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, "train")
    given = {name: values[name] for name in ("objective", "text") if name in values}
    given["data"] = {"clean_captions": data.get("clean_captions", False), "train": [{"kind": "jsonl", "path": "-"}]}
    return parser.instantiate(parser.parse_object({"train": {"model": "-", "run": "-", **given}})).train


RUNS: dict[str, Callable[[Namespace, Path], tuple[dict[str, float], int]]] = {
    "retrieval": _retrieve,
    "perplexity": _foretell,
}

COMMANDS: Commands = {
    "eval": (
        _eval,
        _add_eval,
        "Measure a model on a benchmark: captions, answers to questions, retrieval, perplexity.",
        "mgpt4 eval models/minigpt4-7b --task caption --data captions_val2014.json --images val2014 --out runs/coco\n"
        "  mgpt4 eval models/blip2 --task retrieval --data flickr30k_test.json --images flickr30k --out runs/flickr",
    ),
}
