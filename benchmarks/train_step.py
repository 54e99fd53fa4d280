"""A training step beside PyTorch `transformers`: frozen but for the projection, the same work, interleaved rounds.

    python benchmarks/train_step.py [--rounds 7] [--layers 8] [--width 1024]      this processor, float32
    python benchmarks/train_step.py --size 7b --device gpu                        true size, bfloat16, one GPU

On the processor both sides hold the same weights, sent through the converter, and must agree on every loss. A step is
forward, backward and AdamW on rows of stage 1, `[BOS][picture][caption]`, none padded. Measured are the language model
alone (projection and LLaMA, on what the Q-Former gives) and the whole, whose ViT and Q-Former run without gradients.
PyTorch's side is `Blip2ForConditionalGeneration` with a LLaMA inside. Ours is the step that `mgpt4 train` compiles: it
reads logits only where a caption may be predicted. "Logits everywhere" computes them for every position, as PyTorch's
side always does.

At a true size random weights are made on the device by each side, one side after the other. `--size tiny --device cpu`
tries that program out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from interleaved import SIDES, Answer, Answers, measure, print_table, serve, times

if TYPE_CHECKING:
    import torch

    from mgpt4_jax.config import ModelConfig
    from mgpt4_jax.train.setup import Plan

VOCAB = 32000
HEAD_DIM = 64
LENGTH = 65  # the beginning of the sequence, 32 positions of the picture, 32 of the caption
TASKS = {
    "language model": {"part": "llm"},
    "language model, logits everywhere": {"part": "llm", "everywhere": True},
    "whole": {"part": "whole"},
}
RATE, DECAY = 1e-4, 0.05
TOLERANCE = 1e-4  # of a loss, between the sides


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=8, help="of the language model; the ViT has a quarter as many")
    parser.add_argument("--width", type=int, default=1024, help="of the language model and the ViT")
    parser.add_argument("--batch-size", type=int, default=None, help="rows (default 8; 64 at a true size)")
    parser.add_argument("--size", choices=SIZES, help="a true size instead, with weights made on the device")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = args.batch_size or (64 if args.size else 8)
    if args.side:
        serve(side(args, rows))
    elif args.size:
        arguments = ["--size", args.size, "--device", args.device, "--batch-size", str(rows)]
        answers = measure(__file__, arguments, {"whole": TASKS["whole"]}, args.rounds, at_once=False)
        print_device_table(answers, rows)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_models(Path(folder), args.layers, args.width)
            arguments = ["--models", folder, "--batch-size", str(rows)]
            answers = measure(__file__, arguments, TASKS, args.rounds)
        check_losses(answers)
        print_table(answers, f"{args.layers} layers of {args.width}, {rows} rows of {LENGTH}, float32")
        print_peaks(answers)


def check_losses(answers: Answers) -> None:
    """Both sides started from the same weights and saw the same batches: every loss must agree."""
    for task, sides in answers.items():
        theirs, ours = ([answer["loss"] for answer in sides[side]] for side in SIDES)
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, err_msg=task)
    print(f"losses agree within {TOLERANCE} in every round\n")


def print_peaks(answers: Answers) -> None:
    print("\n| task | peak resident memory: PyTorch, MB | ours, MB |\n|---|---|---|")
    for task, sides in answers.items():
        theirs, ours = (max(answer["peak_mb"] for answer in sides[side]) for side in SIDES)
        print(f"| {task} | {theirs:.0f} | {ours:.0f} |")


def print_device_table(answers: Answers, rows: int) -> None:
    print("| side | samples/s | TFLOP a sample | share of the device's peak (MFU) | peak memory, GB |")
    print("|---|---|---|---|---|")
    counted = answers["whole"]["jax"][0]
    for name, found in answers["whole"].items():
        seconds, flops = statistics.median(answer["seconds"] for answer in found), counted[f"flops_of_{name}"]
        share = f"{flops / seconds / counted['peak_flops']:.1%}" if counted["peak_flops"] else "unknown"
        memory = max(answer["peak_mb"] for answer in found) / 1e3
        print(f"| {name} | {rows / seconds:.1f} | {flops / rows / 1e12:.4g} | {share} | {memory:.2f} |")


def side(args: argparse.Namespace, rows: int) -> Callable[..., Answer]:
    """What one process serves. The platform is chosen before jax is imported."""
    if args.side == "jax":
        os.environ["JAX_PLATFORMS"] = "cuda" if args.device == "gpu" else "cpu"
        return jax_side(args.models, args.size, rows)
    return torch_side(args.models, args.size, "cuda" if args.device == "gpu" else "cpu", rows)


# --- what is trained, and on what ------------------------------------------------------------------------


def true_config(size: str) -> ModelConfig:
    from mgpt4_jax.config import llama_7b, llama_13b, minigpt4, replace_fields

    if size != "tiny":
        return minigpt4({"7b": llama_7b, "13b": llama_13b}[size]())
    config = minigpt4(dataclasses.replace(llama_7b(), hidden_size=64, mlp_size=128, num_layers=2, num_heads=4))
    llama = {"num_kv_heads": 4, "head_dim": 16, "vocab_size": 500}
    vit = {"image_size": 28, "hidden_size": 32, "mlp_size": 64, "num_layers": 2, "num_heads": 4}
    qformer = {"hidden_size": 32, "mlp_size": 64, "num_layers": 2, "num_heads": 4, "encoder_size": 32}
    return replace_fields(config, {"llama": llama, "vit": vit, "qformer": qformer})


SIZES = ("7b", "13b", "tiny")


def write_models(folder: Path, layers: int, width: int) -> None:
    """A random model of ``transformers`` in ``hf``, and what our converter makes of it in ``model``."""
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    from mgpt4_jax.convert.convert import convert

    torch.manual_seed(0)
    shape = {"hidden_size": width, "num_attention_heads": width // HEAD_DIM}
    llama = shape | {"intermediate_size": width * 11 // 4, "num_hidden_layers": layers, "vocab_size": VOCAB}
    vision = shape | {"intermediate_size": 4 * width, "num_hidden_layers": max(layers // 4, 1), "image_size": 224}
    qformer = {"hidden_size": width // 4, "num_attention_heads": width // 4 // HEAD_DIM or 1, "num_hidden_layers": 4}
    config = Blip2Config(
        vision_config=vision | {"patch_size": 14},
        qformer_config=qformer | {"intermediate_size": width, "encoder_hidden_size": width},
        text_config=llama | {"model_type": "llama", "eos_token_id": None},
        num_query_tokens=32,
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder / "hf")
    convert(from_dir=folder / "hf", out=folder / "model")


def make_batch(config: ModelConfig, rows: int, seed: int, part: str) -> dict[str, np.ndarray]:
    """Rows of stage 1 as the trainer's loader gives them; for the language model alone what the Q-Former could give."""
    from mgpt4_jax.config import IGNORED

    rng = np.random.default_rng(seed)
    q, size = config.tokens_per_image, config.vit.image_size
    ids = rng.integers(3, config.llama.vocab_size, (rows, LENGTH)).astype(np.int32)
    ids[:, 0] = 1
    place = np.arange(LENGTH)
    slots = np.where((place > 0) & (place <= q), place - 1, -1)[None].repeat(rows, 0).astype(np.int32)
    targets = np.where(place > q, ids, IGNORED).astype(np.int32)
    batch = {"ids": ids, "slots": slots, "targets": targets, "mask": np.ones((rows, LENGTH), bool)}
    if part == "whole":
        return batch | {"pixels": rng.integers(0, 256, (rows, 1, size, size, 3), np.uint8)}
    return batch | {"states": rng.standard_normal((rows, q, config.qformer.hidden_size), dtype=np.float32)}


def reset_peak() -> None:
    """Let the kernel count this process's peak resident memory from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1e3


# --- ours ------------------------------------------------------------------------------------------------


def jax_side(models: Path | None, size: str | None, rows: int) -> Callable[..., Answer]:
    """The program that ``mgpt4 train`` compiles, from its plan and its state."""
    import jax
    import jax.numpy as jnp

    from mgpt4_jax.sharding import put_batch
    from mgpt4_jax.train.flops import peak_flops
    from mgpt4_jax.train.setup import Programs, load_state
    from mgpt4_jax.train.stages import STAGES

    plan = make_plan(models, size, rows)
    state, frozen = load_state(plan) if models else random_state(plan)
    rows_of_stage = STAGES[plan.config.objective].rows(plan.config, plan.manifest)
    programs = Programs(plan, rows_of_stage, frozen, say=lambda _: None)
    steps = {("whole", False): programs.step(LENGTH)}
    if models:
        steps |= {("llm", everywhere): llm_step(plan, programs.module, everywhere) for everywhere in (False, True)}
    states = {task: jax.tree.map(jnp.copy, state) for task in steps}  # a step takes its state
    device = jax.devices()[0]
    counts = {} if models else count(plan, programs, frozen) | {"peak_flops": peak_flops(device, plan.dtype) or 0.0}

    def run(seed: int, part: str, everywhere: bool = False) -> Answer:
        task, batch, loss = (part, everywhere), make_batch(plan.model, rows, seed, part), 0.0

        def step() -> None:
            nonlocal loss
            arrays = put_batch(plan.mesh, batch)
            states[task], metrics = steps[task](states[task], frozen, arrays, np.float32(RATE))
            loss = float(metrics["loss"])

        reset_peak()
        found, memory = times(step), peak_mb()
        if device.platform == "gpu":
            memory = device.memory_stats()["peak_bytes_in_use"] / 1e6
        return found | counts | {"loss": loss, "peak_mb": memory}

    return run


def make_plan(models: Path | None, size: str | None, rows: int) -> Plan:
    from mgpt4_jax.checkpoint import ModelManifest
    from mgpt4_jax.sharding import make_mesh
    from mgpt4_jax.train import setup
    from mgpt4_jax.train_config import DataConfig, OptimConfig, SourceConfig, TextConfig, TrainConfig

    with tempfile.TemporaryDirectory() as folder:
        if models is None:
            ModelManifest(true_config(size), "vicuna_v0", 0, {}).write(Path(folder))
        config = TrainConfig(
            model=str(models / "model") if models else folder,
            run="",
            data=DataConfig((SourceConfig("jsonl", ""),)),
            text=TextConfig(max_text_length=32),
            optim=OptimConfig(weight_decay=DECAY),
            batch_size=rows,
            dtype="float32" if models else "bfloat16",
        )
        return setup.make_plan(config, make_mesh("data=1"))


def random_state(plan: Plan) -> tuple[Any, Any]:
    """(state, frozen parameters), drawn on the device: nothing of their size passes through the host."""
    import jax
    import jax.numpy as jnp

    from mgpt4_jax.checkpoint import flatten, nest
    from mgpt4_jax.models import abstract_params
    from mgpt4_jax.train.state import make_state, split

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)

    leaves = {}
    for number, (path, leaf) in enumerate(flatten(abstract_params(plan.model)).items()):
        dtype = jnp.dtype(jnp.float32) if path in plan.trained else plan.dtype
        is_one = path == "temp" or path.endswith("/scale")
        leaves[path] = jnp.ones(leaf.shape, dtype) if is_one else draw(jax.random.key(number), leaf.shape, dtype)
    leaves = {path: jax.device_put(leaf, plan.shardings[path]) for path, leaf in leaves.items()}
    trainable, frozen = split(nest(leaves), set(plan.trained))
    make = functools.partial(make_state, optimizer=plan.optimizer, seed=0, with_average=False)
    return jax.jit(make, out_shardings=plan.state_shardings)(trainable), frozen


def count(plan: Plan, programs: Any, frozen: Any) -> dict[str, float]:
    """Operations of our step, and of the one that computes logits at every position, as PyTorch's side does."""
    from mgpt4_jax.train.flops import count_flops
    from mgpt4_jax.train.objectives import caption_objective
    from mgpt4_jax.train.step import make_train_step

    step = make_train_step(caption_objective(programs.module), plan.optimizer, plan.state_shardings)
    everywhere = count_flops(step, plan.abstract, frozen, programs.abstract_batch(LENGTH), np.float32(RATE))
    return {"flops_of_jax": programs.flops[LENGTH], "flops_of_torch": everywhere}


def llm_step(plan: Plan, module: Any, everywhere: bool) -> Any:
    """The same step on what the Q-Former gave."""
    from mgpt4_jax.losses import answer_loss, counted_positions
    from mgpt4_jax.train.step import make_train_step

    def read_states(model: Any, batch: Mapping[str, Any], read: Any) -> Any:
        embeds = model.embed(batch["ids"], batch["slots"], model.projection(batch["states"]))
        return model.llama(embeds, batch["mask"], read=read)

    def objective(params: Any, batch: Mapping[str, Any], key: Any) -> tuple[Any, dict[str, Any]]:
        most = LENGTH if everywhere else plan.config.text.max_text_length
        read, targets = counted_positions(batch["targets"], most)
        logits = module.apply({"params": params}, batch, read, method=read_states)
        loss, metrics = answer_loss(logits, targets)
        return loss, {"weight": metrics["num_tokens"]}

    return make_train_step(objective, plan.optimizer, plan.state_shardings)


# --- PyTorch's -------------------------------------------------------------------------------------------


def torch_side(models: Path | None, size: str | None, device: str, rows: int) -> Callable[..., Answer]:
    """``Blip2ForConditionalGeneration``, all frozen but the projection, which is float32 and has its AdamW."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, config = torch_model(models, size, device)
    projections: dict[tuple[str, bool], TorchProjection] = {}

    def run(seed: int, part: str, everywhere: bool = False) -> Answer:
        batch = {name: torch.from_numpy(a) for name, a in make_batch(config, rows, seed, part).items()}
        projection = projections.setdefault((part, everywhere), TorchProjection(model.language_projection, device))
        loss = 0.0

        def step() -> None:
            nonlocal loss
            loss = torch_step(model, projection, {name: a.to(device) for name, a in batch.items()})

        reset_peak()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found, memory = times(step), peak_mb()
        if device == "cuda":
            memory = torch.cuda.max_memory_allocated() / 1e6
        return found | {"loss": loss, "peak_mb": memory}

    return run


def torch_model(models: Path | None, size: str | None, device: str) -> tuple[Any, ModelConfig]:
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    from mgpt4_jax.checkpoint import read_manifest
    from mgpt4_jax.convert.hf_config import export_config

    if models:
        model = Blip2ForConditionalGeneration.from_pretrained(models / "hf", dtype=torch.float32)
        config = read_manifest(models / "model").config
    else:
        config = true_config(size)
        values = export_config(config, {"": "bfloat16"})
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = Blip2ForConditionalGeneration(Blip2Config(**values))
        torch.set_default_dtype(usual)
    return model.eval().requires_grad_(False), config


class TorchProjection:
    """The trained layer and its optimiser; it computes in the dtype of what it is given, as ours."""

    def __init__(self, layer: torch.nn.Linear, device: str):
        import torch

        self.weight = layer.weight.detach().to(device, torch.float32, copy=True).requires_grad_()
        self.bias = layer.bias.detach().to(device, torch.float32, copy=True).requires_grad_()
        groups = [{"params": [self.weight], "weight_decay": DECAY}, {"params": [self.bias], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def torch_step(model: Any, projection: TorchProjection, batch: Mapping[str, torch.Tensor]) -> float:
    import torch

    from mgpt4_jax.data.images import MEAN, STD

    dtype, device = model.language_model.dtype, batch["ids"].device
    with torch.no_grad():
        if "states" in batch:
            states = batch["states"].to(dtype)
        else:
            mean, std = (torch.tensor(np.array(x), dtype=torch.float32, device=device) for x in (MEAN, STD))
            pixels = ((batch["pixels"][:, 0].float() / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype)
            queries = model.query_tokens.expand(len(pixels), -1, -1)
            tokens = model.vision_model(pixels).last_hidden_state
            states = model.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
        words = model.get_input_embeddings()(batch["ids"])
    image = projection(states)
    embeds = torch.cat([words[:, :1], image, words[:, 1 + image.shape[1] :]], dim=1)
    found = model.language_model(
        inputs_embeds=embeds, attention_mask=batch["mask"].long(), labels=batch["targets"].long(), use_cache=False
    )
    projection.optimizer.zero_grad()
    found.loss.backward()
    projection.optimizer.step()
    return found.loss.item()


if __name__ == "__main__":
    main()
