"""``mgpt4.load`` and the model that it gives: generate, stream, chat, embed, match."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mgpt4_jax.checkpoint import ModelManifest, load_params, read_leaf, read_manifest
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.data.images import ImageSource, eval_transform, load_image
from mgpt4_jax.data.prompts import get_template
from mgpt4_jax.data.text import BertTokenizer, Tokenizer, load_bert_tokenizer, load_llama_tokenizer
from mgpt4_jax.data.text_lm import load_opt_tokenizer, load_t5_tokenizer
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.answer import Answerer, Generation, Prepared, Question
from mgpt4_jax.generate.beam_engine import Hypothesis
from mgpt4_jax.generate.captions import DEFAULTS as CAPTIONS
from mgpt4_jax.generate.captions import Captioner
from mgpt4_jax.generate.chat import Chat
from mgpt4_jax.generate.engine import Engine
from mgpt4_jax.generate.language import MAX_LENGTH, LanguageEngine
from mgpt4_jax.generate.memory import MemoryPlan, plan_memory
from mgpt4_jax.generate.sampling import sampling_params
from mgpt4_jax.generate.vision import ImageEncoder
from mgpt4_jax.models import build
from mgpt4_jax.sharding import make_mesh
from mgpt4_jax.typing import Bool, Float, Int, Params

Images = ImageSource | Sequence[ImageSource] | None

DTYPES = ("auto", "float32", "bfloat16")
ANSWERING = ("minigpt4", "instructblip", "blip2_opt", "blip2_t5", "llama", "opt", "t5")
TEXT_LENGTH = 32
MATCH_ROWS = 16  # picture-text pairs in one program of `match`


def load(
    model_dir: str | Path,
    *,
    mesh: str | None = None,
    dtype: str = "auto",
    max_length: int | None = None,
    slots: int | None = None,
) -> Model | RetrievalModel:
    """Load a model directory: a ``Model`` that answers or, of architecture ``blip2``, a ``RetrievalModel``.

    Args:
      mesh: how to cut it over devices, for example ``"fsdp=4"`` or ``"data=2,tensor=2"``; one device if None.
      dtype: ``auto`` is bfloat16 on GPU and TPU and float32 on a CPU, unless that does not fit its memory.
      max_length: the longest prompt with its answer, in tokens; the model's own limit if None.
      slots: rows decoded together, a power of two; 8 on a CPU and 32 elsewhere, fewer if memory is short.
    """
    manifest, devices = read_manifest(model_dir), make_mesh(mesh)
    plan = make_plan(manifest, devices, dtype=dtype, max_length=max_length, slots=slots)
    params = load_params(model_dir, plan.dtype, devices, without="llama")
    if manifest.config.architecture == "blip2":
        return RetrievalModel(manifest, params, _bert(model_dir), plan.dtype)
    if manifest.config.architecture not in ANSWERING:
        raise UserError(f"{model_dir}: a model of architecture {manifest.config.architecture!r} cannot answer")
    config = manifest.config
    engine: Engine | LanguageEngine
    if config.llama is None:
        engine, tokenizer = _language_engine(model_dir, config, params, plan)
    else:
        engine, tokenizer = _llama_engine(model_dir, config, devices, plan)
    encoder = None if config.vit is None else ImageEncoder(config, params, jnp.dtype(plan.dtype))
    template = get_template(manifest.template)
    return Model(manifest, Answerer(engine, tokenizer, template, encoder, _bert(model_dir)), plan)


def _llama_engine(model_dir: str | Path, config: ModelConfig, mesh: Mesh, plan: MemoryPlan) -> tuple[Engine, Tokenizer]:
    """Read and packed a layer at a time."""
    pad = {"pad_token": None} if config.architecture == "instructblip" else {}
    tokenizer = load_llama_tokenizer(Path(model_dir) / "tokenizer", **pad)
    engine = Engine(
        config,
        lambda path, layer: read_leaf(model_dir, f"llama/{path}", layer),
        mesh,
        dtype=jnp.dtype(plan.dtype),
        slots=plan.slots,
        max_length=plan.max_length,
        eos_ids=(tokenizer.eos_id,),
        bos_id=tokenizer.bos_id,
    )
    return engine, tokenizer


def _language_engine(
    model_dir: str | Path, config: ModelConfig, params: Params, plan: MemoryPlan
) -> tuple[LanguageEngine, Tokenizer]:
    """OPT's answers end with a line break where BLIP-2 taught it so."""
    directory = Path(model_dir) / "tokenizer"
    if config.t5 is not None:
        tokenizer = load_t5_tokenizer(directory)
        ends, begins = (tokenizer.eos_id,), config.t5.start_id
    else:
        tokenizer = load_opt_tokenizer(directory)
        is_blip2 = config.architecture == "blip2_opt"
        ends, begins = (tokenizer.encode("\n")[-1] if is_blip2 else tokenizer.eos_id,), tokenizer.bos_id
    sizes = {"slots": plan.slots, "max_length": plan.max_length}
    engine = LanguageEngine(config, params, dtype=jnp.dtype(plan.dtype), **sizes, eos_ids=ends, bos_id=begins)
    return engine, tokenizer


def make_plan(
    manifest: ModelManifest, mesh: Mesh, *, dtype: str = "auto", max_length: int | None = None, slots: int | None = None
) -> MemoryPlan:
    """Choose what ``load`` leaves open; says on stderr when float32 gives way to bfloat16 for want of memory."""
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; one of {', '.join(DTYPES)}")
    if max_length is not None and max_length < 2:
        raise UserError(f"max_length must be at least 2, got {max_length}")
    config = manifest.config
    limit = 1 if config.language_model is None else getattr(config.language_model, "max_positions", MAX_LENGTH)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    plan_of = partial(plan_memory, config, mesh, max_length=min(max_length or limit, limit))
    rows = slots or (8 if on_cpu else 32)
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
        smallest = plan_of(dtype="float32", slots=slots or 1)
        if dtype == "float32" and not smallest.fits:
            dtype = "bfloat16"
            print(f"float32 does not fit ({smallest}): loading as bfloat16", file=sys.stderr)
    while slots is None and rows > 1 and not plan_of(dtype=dtype, slots=rows).fits:
        rows //= 2
    return plan_of(dtype=dtype, slots=rows)


def _bert(model_dir: str | Path) -> BertTokenizer | None:
    directory = Path(model_dir) / "qformer_tokenizer"
    return load_bert_tokenizer(directory) if directory.is_dir() else None


class Model:
    """A model that answers questions. Not for several threads at once."""

    def __init__(self, manifest: ModelManifest, answerer: Answerer, plan: MemoryPlan):
        self.manifest, self.answerer, self.plan = manifest, answerer, plan
        self.config, self.tokenizer = manifest.config, answerer.tokenizer

    def generate(
        self,
        *,
        prompts: Sequence[str],
        images: Sequence[Images] | None = None,
        template: str | None = None,
        **sampling: Any,
    ) -> list[Generation]:
        """Answer every prompt, all in one batch; each answer is what it would be alone.

        Args:
          images: for each prompt a picture (path, bytes, data URI or Pillow image), a list of them, or None.
            ``<ImageHere>`` in a prompt says where its pictures stand; without it they come first.
          template: the conversation template; the model's own if None; ``"none"`` gives the text as it is.
          sampling: fields of ``SamplingParams``: max_new_tokens, temperature (0: greedy), top_p, stop, seed,
            num_beams (over 1: beam search), length_penalty, num_return_sequences, ...
        """
        if isinstance(prompts, str):
            raise UserError("prompts must be a list of texts; for one prompt write prompts=[...]")
        drafts = self._prepare(prompts, images, template, sampling)
        prepared = [self._check(index, draft) for index, draft in enumerate(drafts)]
        answers = dict(self.answerer.answers(prepared))
        return [answers[index] for index in range(len(prepared))]

    def stream(self, prompt: str, images: Images = None, template: str | None = None, **sampling: Any) -> Iterator[str]:
        """Pieces of one answer as they are decoded."""
        [prepared] = self._prepare([prompt], [images], template, sampling)
        return self.answerer.stream(self._check(None, prepared))

    def chat(self, template: str | None = None) -> Chat:
        """A new conversation, in the model's own template if None."""
        return Chat(self.answerer, None if template is None else get_template(template))

    def _prepare(
        self, prompts: Sequence[str], images: Sequence[Images] | None, template: str | None, sampling: dict[str, Any]
    ) -> list[Prepared | UserError]:
        pictures = [None] * len(prompts) if images is None else images
        if len(pictures) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(pictures)} entries in images; give one entry a prompt")
        params = sampling_params(sampling)
        chosen = None if template is None else get_template(template)
        questions = [
            Question(prompt, as_images(entry), params, chosen) for prompt, entry in zip(prompts, pictures, strict=True)
        ]
        return self.answerer.prepare(questions)

    @staticmethod
    def _check(index: int | None, prepared: Prepared | UserError) -> Prepared:
        if isinstance(prepared, UserError):
            raise UserError(str(prepared) if index is None else f"prompt {index}: {prepared}") from prepared
        return prepared


def as_images(entry: Images) -> tuple[ImageSource, ...]:
    """What a user may give for the pictures of one prompt, as a tuple."""
    if entry is None:
        return ()
    if isinstance(entry, list | tuple):
        return tuple(entry)
    return (entry,)  # type: ignore[return-value]  # whatever else it is, `load_image` says what it should be


@dataclass
class RetrievalModel:
    """BLIP-2 stage 1: pictures and texts in one space, and whether they match."""

    manifest: ModelManifest
    params: Params
    tokenizer: BertTokenizer | None
    dtype: str

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            raise UserError("the model directory lacks qformer_tokenizer/; convert it with --qformer-tokenizer")
        self.config = self.manifest.config
        self._module = build(self.config, jnp.dtype(self.dtype))

        def method(name: str) -> Any:
            return jax.jit(partial(self._module.apply, method=name))

        self._features, self._texts = method("image_features"), method("text_features")
        self._tokens, self._match = method("encode_pixels"), method("match_logits")
        self._captioner: Captioner | None = None

    def embed_images(self, images: Sequence[ImageSource]) -> Float[np.ndarray, "i q c"]:
        """Unit vectors of every query of each picture; the similarity to a text is that of the best query."""
        pixels = self._pixels(images)
        return self._batched(lambda some: self._features({"params": self.params}, some).embeds, pixels)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "b c"]:
        """A unit vector for each text, of which the first 32 word pieces are read (LAVIS ``max_txt_len``)."""
        ids, valid = self._encode_texts(texts)
        return self._batched(lambda i, v: self._texts({"params": self.params}, i, v)[:, 0], ids, valid)

    def match(self, images: Sequence[ImageSource], texts: Sequence[str]) -> Float[np.ndarray, "i b"]:
        """The probability that each text belongs to each picture (the ITM head), for all pairs."""
        ids, valid = self._encode_texts(texts)
        tokens = self._batched(lambda pixels: self._tokens({"params": self.params}, pixels), self._pixels(images))
        first, second = (index.ravel() for index in np.indices((len(tokens), len(ids))))
        rows = self._batched(
            lambda i, j: self._match({"params": self.params}, tokens[i], ids[j], valid[j]), first, second
        )
        return np.asarray(jax.nn.softmax(rows, axis=-1))[:, 1].reshape(len(tokens), len(ids))

    def caption(self, images: Sequence[ImageSource], **sampling: Any) -> list[Generation]:
        """What the Q-Former itself says of each picture (ITG), by beam search.

        Args:
          sampling: fields of ``SamplingParams`` other than those of drawing, and ``stop``; 3 beams and 10 to 30 tokens
            by default, as LAVIS has it.
        """
        if self._captioner is None:
            self._captioner = Captioner(self.config, self.params, self.tokenizer, jnp.dtype(self.dtype))
        params = sampling_params(sampling, CAPTIONS)
        return [self._caption(found) for found in self._captioner.captions(self._pixels(images), params)]

    def _caption(self, found: list[Hypothesis]) -> Generation:
        """The best of the hypotheses, with the others."""
        best, *others = (
            Generation(self.tokenizer.decode(one.ids), one.ids, one.finish_reason, 0, len(one.ids), one.score)
            for one in found
        )
        return dataclasses.replace(best, others=tuple(others))

    def _pixels(self, images: Sequence[ImageSource]) -> Float[np.ndarray, "i H W 3"]:
        if not len(images):
            raise UserError("no pictures were given")
        return np.stack([eval_transform(load_image(image), self.config.vit.image_size) for image in images])

    def _encode_texts(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
        if isinstance(texts, str) or not len(texts):
            raise UserError("texts must be a list of one text or more")
        assert self.tokenizer is not None
        batch = self.tokenizer.encode_batch(list(texts), max_length=min(TEXT_LENGTH, self.config.qformer.max_positions))
        return batch.ids, batch.mask

    @staticmethod
    def _batched(function: Any, *arrays: np.ndarray) -> np.ndarray:
        """``function`` over groups of ``MATCH_ROWS`` rows, the last one filled with copies: one program."""
        count = len(arrays[0])
        size = min(MATCH_ROWS, 1 << (count - 1).bit_length())
        parts = []
        for start in range(0, count, size):
            index = np.minimum(np.arange(start, start + size), count - 1)
            parts.append(np.asarray(function(*(array[index] for array in arrays)), np.float32))
        return np.concatenate(parts)[:count]
