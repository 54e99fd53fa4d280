"""From weight files to a model directory: infer, plan, then stream; nothing is left behind on failure."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mgpt4_jax.checkpoint import ModelManifest, ParamsWriter, SourceFile, new_directory
from mgpt4_jax.data.prompts import get_template
from mgpt4_jax.data.text import copy_tokenizer, load_bert_tokenizer, load_llama_tokenizer
from mgpt4_jax.data.text_lm import load_opt_tokenizer, load_t5_tokenizer
from mgpt4_jax.errors import UserError
from mgpt4_jax.models import abstract_params

from .infer import infer
from .inferred import Inferred, Overrides
from .language import kind_of
from .readers import Source, SumSource, open_source
from .report import Report, summarize
from .rules import Plan, apply, plan

Paths = str | Path
Progress = Callable[[int, int], None]
_HASH_BLOCK = 1 << 22
# Of each kind of language model: how its tokeniser is read, and the files that tell that it is there.
_TOKENIZERS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "llama": (load_llama_tokenizer, ("tokenizer.model", "tokenizer.json")),
    "opt": (load_opt_tokenizer, ("merges.txt", "tokenizer.json")),
    "t5": (load_t5_tokenizer, ("spiece.model", "tokenizer.json")),
}


def convert(
    *,
    vit: Paths | None = None,
    qformer: Paths | None = None,
    llm: Paths | None = None,
    llm_delta: Paths | None = None,
    projection: Paths | None = None,
    bert: Paths | None = None,
    from_dir: Paths | None = None,
    out: Paths,
    template: str | None = None,
    overrides: Overrides | None = None,
    image_size: int | None = None,
    tokenizer: Paths | None = None,
    qformer_tokenizer: Paths | None = None,
    allow_llm_mismatch: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert published PyTorch weights to the model directory ``out``.

    * ``vit``, ``qformer``, ``llm``, ``projection``: ``eva_vit_g.pth``, ``blip2_pretrained*.pth``, a Hugging
      Face directory of a LLaMA, OPT or T5, ``pretrained_minigpt4*.pth``; parts may be absent (the language model
      alone, the picture side alone). ``llm_delta``: Vicuna's delta weights, added to the LLaMA of ``llm``.
    * ``bert``: with ``vit`` alone, a Hugging Face directory of bert-base-uncased: where stage 1 begins.
    * ``from_dir``: instead of all these, one Hugging Face directory (Blip2*, InstructBlip*, LLaMA, OPT, T5).
    * ``overrides``: what the files cannot tell, ``{"vit": {"num_heads": 4}}``; ``image_size`` in pixels resizes
      the position embeddings.
    * ``tokenizer``, ``qformer_tokenizer``: directories to copy; by default those beside the language model.
    * ``seed``: of a projection that no file holds, which begins random.
    * ``progress(done, total)`` is called with bytes.

    Tensors keep the dtype of the file. Raises ``UserError``; ``out`` then is as it was.
    """
    if template is not None:
        get_template(template)
    if seed < 0:
        raise UserError(f"seed must be at least 0, got {seed}")
    sources = open_sources(vit, qformer, llm, llm_delta, projection, from_dir, bert)
    if image_size is not None:
        overrides = {**(overrides or {}), "vit": {**(overrides or {}).get("vit", {}), "image_size": image_size}}
    inferred = infer(sources, overrides, allow_llm_mismatch=allow_llm_mismatch, seed=seed)
    if inside := [file for _, file in source_files(sources) if file.resolve().is_relative_to(Path(out).resolve())]:
        raise UserError(f"{out}: holds {inside[0]}, one of the files to convert; choose another --out")
    planned = plan(inferred.parts, abstract_params(inferred.config))
    _check_space(Path(out), planned.num_bytes)
    with new_directory(out, overwrite=overwrite) as partial:
        with _hashing(sources) as hashes:
            writer = ParamsWriter(partial)
            apply(planned, writer, progress)
            writer.finish()
            files = tuple(future.result() for future in hashes)
        language = sources.get("llm") or sources.get("bert") or sources.get("model")
        _copy_tokenizers(partial, inferred, language, tokenizer, qformer_tokenizer)
        manifest = ModelManifest(
            config=inferred.config,
            template=template or inferred.template,
            num_parameters=planned.num_parameters,
            dtypes=writer.dtypes,
            sources=files,
        )
        manifest.write(partial)
    return summarize(Path(out), planned, inferred, manifest)


def plan_conversion(
    *,
    vit: Paths | None = None,
    qformer: Paths | None = None,
    llm: Paths | None = None,
    llm_delta: Paths | None = None,
    projection: Paths | None = None,
    from_dir: Paths | None = None,
    overrides: Overrides | None = None,
    allow_llm_mismatch: bool = False,
) -> tuple[Inferred, Plan]:
    """What ``convert`` would do, without doing it: also how ``verify`` finds the source of a parameter."""
    sources = open_sources(vit, qformer, llm, llm_delta, projection, from_dir)
    inferred = infer(sources, overrides, allow_llm_mismatch=allow_llm_mismatch)
    return inferred, plan(inferred.parts, abstract_params(inferred.config))


def open_sources(
    vit: Paths | None = None,
    qformer: Paths | None = None,
    llm: Paths | None = None,
    llm_delta: Paths | None = None,
    projection: Paths | None = None,
    from_dir: Paths | None = None,
    bert: Paths | None = None,
) -> dict[str, Source]:
    """Open the files, by role; refuse combinations that mean nothing."""
    paths = {"vit": vit, "qformer": qformer, "llm": llm, "projection": projection, "bert": bert}
    named = {role: path for role, path in paths.items() if path is not None}
    if from_dir is not None:
        if named or llm_delta is not None:
            raise UserError(f"--from {from_dir} is a whole model; leave out --{next(iter(named), 'llm-delta')}")
        return {"model": open_source(from_dir)}
    if not named:
        raise UserError("nothing to convert: give --vit, --qformer, --llm, --projection, --bert, or --from DIR")
    if bert is not None and (others := [role for role in named if role not in ("vit", "bert")]):
        raise UserError(f"--bert {bert} is where a Q-Former begins; leave out --{others[0]}, or --bert")
    if llm_delta is not None and llm is None:
        raise UserError(f"--llm-delta {llm_delta} needs --llm, the LLaMA weights that it is added to")
    sources = {role: open_source(path) for role, path in named.items()}
    if llm_delta is not None:
        sources["llm"] = SumSource(sources["llm"], open_source(llm_delta))
    return sources


def _check_space(out: Path, needed: int) -> None:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"{out}: needs {needed / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free on that disk")


def source_files(sources: Mapping[str, Source]) -> list[tuple[str, Path]]:
    """(role, file) of every file; the delta of a sum has the role ``llm_delta``."""
    files = []
    for role, source in sources.items():
        parts = {role: source}
        if isinstance(source, SumSource):
            parts = {role: source.base, "llm_delta": source.delta}
        files += [(name, path) for name, part in parts.items() for path in part.files]
    return files


@contextlib.contextmanager
def _hashing(sources: Mapping[str, Source]) -> Iterator[list[Future[SourceFile]]]:
    """Hash the files on a second thread while the first converts them; a failure stops both."""
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256") as pool:
        try:
            yield [pool.submit(hash_file, role, path, stop) for role, path in source_files(sources)]
        finally:
            stop.set()


def hash_file(role: str, path: Path, stop: threading.Event | None = None) -> SourceFile:
    """Name, size and sha256 of a file; cut short (and wrong) once ``stop`` is set."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while (stop is None or not stop.is_set()) and (block := file.read(_HASH_BLOCK)):
            digest.update(block)
            size += len(block)
    return SourceFile(role, path.name, size, digest.hexdigest())


def _copy_tokenizers(
    partial: Path,
    inferred: Inferred,
    language: Source | None,
    tokenizer: Paths | None,
    qformer_tokenizer: Paths | None,
) -> None:
    """``tokenizer/`` for the language model, ``qformer_tokenizer/`` for a Q-Former that reads text."""
    config = inferred.config
    homes = [] if language is None else [language.path]
    if isinstance(language, SumSource):
        homes.append(language.base.path)
    if (spoken := config.language_model) is not None:
        load, names = _TOKENIZERS[kind_of(spoken)]
        words = _copy_tokenizer(tokenizer, homes, names, partial / "tokenizer", "tokenizer", load, inferred)
        _warn_of_rows("tokenizer", words, spoken.vocab_size, inferred)
    if config.qformer is not None and config.qformer.with_text:
        if spoken is not None:
            homes = [home / "qformer_tokenizer" for home in homes]
        target, names = partial / "qformer_tokenizer", ("vocab.txt", "tokenizer.json")
        option, load = "qformer-tokenizer", load_bert_tokenizer
        words = _copy_tokenizer(qformer_tokenizer, homes, names, target, option, load, inferred)
        _warn_of_rows(option, words, config.qformer.vocab_size, inferred)


def _copy_tokenizer(
    asked: Paths | None,
    homes: list[Path],
    names: tuple[str, ...],
    target: Path,
    option: str,
    load: Callable[..., Any],
    inferred: Inferred,
) -> int:
    """From the path that was asked for, else from beside the weights, else a warning; gives its count of words."""
    found = next((home for home in homes if any((home / name).is_file() for name in names)), None)
    if asked is None and found is None:
        inferred.warnings.append(f"no tokenizer beside the weights; give --{option} before you ask in words")
        return 0
    copy_tokenizer(asked or found, target)
    return load(target).vocab_size


def _warn_of_rows(option: str, words: int, rows: int, inferred: Inferred) -> None:
    if words > rows:
        inferred.warnings.append(f"the {option} knows {words} tokens, the model has {rows}")
