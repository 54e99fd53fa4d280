"""What a step of BLIP-2 stage 1 costs: against the batch, against the devices, and how much of it is the contrast.

    python benchmarks/stage1_scaling.py [--rounds 5]                  this processor, a small model, float32
    python benchmarks/stage1_scaling.py --size true --device gpu      pairs a second at true size, bfloat16, one GPU

The step is the one that `mgpt4 train` compiles: ViT frozen, the Q-Former and its heads trained by ITC, ITM and ITG. The
contrast is the similarities of all texts with all pictures, and their gradients: the only products that grow with the
square of the batch. It is counted at the paper's sizes too, in the step as it is traced there; nothing is computed.

Simulated devices are threads of the same cores. More of them cannot be faster; they show whether cutting the step adds
work (collectives, what every device does again), not what a link between real devices costs.

`--size tiny --device cpu` tries the program for the GPU out.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from interleaved import Answer, measure, serve, times
from train_step import peak_mb, random_state, reset_peak

if TYPE_CHECKING:
    from mgpt4_jax.config import ModelConfig
    from mgpt4_jax.data.rows import Rows
    from mgpt4_jax.train.setup import Plan

BATCHES, DEVICES, FIXED = (8, 16, 32, 64), (1, 2, 4, 8), 32
PAPER = (100, 1680)  # pairs of one device, and of all: BLIP-2, section 3.4, for ViT-g
SIZES = ("true", "small", "tiny")
LENGTH = 32  # word pieces of a caption
RATE = 1e-4
TRAINED = ("ln_vision/*", "qformer/*", "vision_proj/*", "text_proj/*", "itm_head/*", "temp")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, help="pairs a second of this size instead, on one device")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--batch-size", type=int, default=100, help="pairs, with --size (100)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve(side(int(args.side)))
    elif args.size:
        print_speed([*speed(args.size, args.device, args.batch_size, args.rounds)], args.batch_size)
    else:
        print_contrast("true")
        tasks = {str(rows): {"rows": rows} for rows in BATCHES}
        by_batch = measure(__file__, [], tasks, args.rounds, sides=["1"])
        print_machine(args.rounds)
        print_batches({rows: found["1"] for rows, found in by_batch.items()})
        sides = [str(devices) for devices in DEVICES]
        by_devices = measure(__file__, [], {"fixed": {"rows": FIXED}}, args.rounds, sides=sides)["fixed"]
        print_machine(args.rounds)
        print_devices(by_devices)


def side(devices: int, size: str = "small") -> Callable[..., Answer]:
    """What one process serves: steps on so many simulated devices, whose number is set before jax is imported."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    runs: dict[int, Callable[[int], Answer]] = {}

    def run(rows: int, seed: int) -> Answer:
        if rows not in runs:
            runs[rows] = stepper(size, rows, devices)
        return runs[rows](seed)

    return run


def speed(size: str, device: str, rows: int, rounds: int) -> Sequence[Answer]:
    """Steps one after another on one device, after one that warms up."""
    os.environ["JAX_PLATFORMS"] = "cuda" if device == "gpu" else "cpu"
    run = stepper(size, rows, 1, dtype="bfloat16")
    return [run(seed) for seed in range(rounds + 1)][1:]


# --- what is trained, and on what ------------------------------------------------------------------------


def model_config(size: str) -> ModelConfig:
    from mgpt4_jax.config import blip2_stage1, replace_fields

    if size == "true":
        return blip2_stage1()
    width, layers, pixels = {"small": (128, 4, 112), "tiny": (32, 2, 28)}[size]
    shape = {"hidden_size": width, "mlp_size": 4 * width, "num_layers": layers, "num_heads": 4}
    qformer = shape | {"encoder_size": width, "vocab_size": 1000, "max_positions": 64}
    return replace_fields(
        blip2_stage1(), {"vit": shape | {"image_size": pixels}, "qformer": qformer, "projection_size": width}
    )


def make_plan(size: str, rows: int, devices: int = 1, dtype: str = "float32") -> tuple[Plan, Rows]:
    """The plan of `mgpt4 train`, and what it knows of captions: their special tokens."""
    from mgpt4_jax.checkpoint import ModelManifest
    from mgpt4_jax.sharding import make_mesh
    from mgpt4_jax.train.setup import make_plan
    from mgpt4_jax.train.stages import STAGES
    from mgpt4_jax.train_config import DataConfig, SourceConfig, TextConfig, TrainConfig

    config = model_config(size)
    with tempfile.TemporaryDirectory() as folder:
        ModelManifest(config, "none", 0, {}).write(Path(folder))
        tokenizer = Path(folder) / "qformer_tokenizer"
        tokenizer.mkdir()
        others = (f"w{number}" for number in range(config.qformer.vocab_size - len(SPECIAL) - 1))  # and [DEC]
        (tokenizer / "vocab.txt").write_text("".join(f"{piece}\n" for piece in (*SPECIAL, *others)))
        train = TrainConfig(
            model=folder,
            run="",
            data=DataConfig((SourceConfig("jsonl", ""),)),
            objective="qformer_pretrain",
            text=TextConfig(max_text_length=LENGTH, buckets=(LENGTH,), max_length=LENGTH),
            trainable=TRAINED,
            batch_size=rows,
            dtype=dtype,
        )
        plan = make_plan(train, make_mesh(f"data={devices}"))
        captions = STAGES[train.objective].rows(train, plan.manifest)
        assert captions.pad_id == SPECIAL.index("[PAD]")  # read while the folder is there, and kept
        return plan, captions


def make_batch(config: ModelConfig, rows: int, seed: int) -> dict[str, np.ndarray]:
    """Pairs as the trainer's loader gives them, no caption padded."""
    rng = np.random.default_rng(seed)
    size = config.vit.image_size
    ids = rng.integers(len(SPECIAL), config.qformer.vocab_size - 1, (rows, LENGTH)).astype(np.int32)
    ids[:, 0] = SPECIAL.index("[CLS]")
    return {
        "ids": ids,
        "slots": np.full((rows, LENGTH), -1, np.int32),
        "targets": ids,
        "mask": np.ones((rows, LENGTH), bool),
        "pixels": rng.integers(0, 256, (rows, 1, size, size, 3), np.uint8),
    }


def stepper(size: str, rows: int, devices: int, dtype: str = "float32") -> Callable[[int], Answer]:
    """A function that trains a step on the batch of a seed, and says what it took."""
    import jax

    from mgpt4_jax.sharding import put_batch
    from mgpt4_jax.train.flops import peak_flops
    from mgpt4_jax.train.setup import Programs

    plan, captions = make_plan(size, rows, devices, dtype)
    state, frozen = random_state(plan)
    programs = Programs(plan, captions, frozen, say=lambda _: None)
    compiled, device = programs.step(LENGTH), jax.devices()[0]
    counts = {"flops": programs.flops[LENGTH], "contrast": contrast_flops(plan.model, rows)}
    counts["peak_flops"] = peak_flops(device, plan.dtype) or 0.0

    def run(seed: int) -> Answer:
        batch, loss = put_batch(plan.mesh, make_batch(plan.model, rows, seed)), 0.0

        def step() -> None:
            nonlocal state, loss
            state, metrics = compiled(state, frozen, batch, np.float32(RATE))
            loss = float(metrics["loss"])

        reset_peak()
        found, memory = times(step), peak_mb()
        if device.platform == "gpu":
            memory = device.memory_stats()["peak_bytes_in_use"] / 1e6
        return found | counts | {"loss": loss, "peak_mb": memory}

    return run


# --- counting --------------------------------------------------------------------------------------------


def contrast_flops(config: ModelConfig, rows: int) -> int:
    """Operations of both similarities of a batch, and of their gradients."""
    import jax
    import jax.numpy as jnp

    from mgpt4_jax.models import abstract_params, build
    from mgpt4_jax.train.flops import count_flops
    from mgpt4_jax.train.pretraining import similarities

    module = build(config)

    def total(images: Any, texts: Any, params: Any) -> Any:
        return module.apply(
            {"params": params}, method=lambda model: sum(each.sum() for each in similarities(model, images, texts))
        )

    width = config.projection_size
    images = jax.ShapeDtypeStruct((rows, config.qformer.num_queries, width), jnp.float32)
    texts = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    return count_flops(jax.grad(total, argnums=(0, 1)), images, texts, abstract_params(config))


def step_flops(size: str, rows: int) -> int:
    """Operations of a whole step as `mgpt4 train` traces it; neither compiled nor computed."""
    import jax

    from mgpt4_jax.checkpoint import flatten, nest
    from mgpt4_jax.models import abstract_params
    from mgpt4_jax.train.flops import count_flops
    from mgpt4_jax.train.setup import Programs
    from mgpt4_jax.train.stages import STAGES
    from mgpt4_jax.train.state import split
    from mgpt4_jax.train.step import make_train_step

    plan, captions = make_plan(size, rows)
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, plan.dtype, sharding=plan.shardings[path])
        for path, leaf in flatten(abstract_params(plan.model)).items()
    }
    _, frozen = split(nest(leaves), set(plan.trained))
    programs = Programs(plan, captions, frozen, say=lambda _: None)
    objective = STAGES[plan.config.objective].objective(programs.module, captions)
    step = make_train_step(objective, plan.optimizer, plan.state_shardings)
    return count_flops(step, plan.abstract, frozen, programs.abstract_batch(LENGTH), np.float32(RATE))


# --- tables ----------------------------------------------------------------------------------------------


def print_machine(rounds: int) -> None:
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    cores = len(os.sched_getaffinity(0))
    print(f"\n{cores} cores ({platform.machine()}), load {load}, {rounds} rounds, {time.strftime('%Y-%m-%d')}\n")


def print_batches(found: dict[str, list[Answer]]) -> None:
    """``found``: of each batch, in rounds of which each did all."""
    first = next(iter(found.values()))
    print("| pairs | ms | times the first (median of rounds) | least .. most | operations | of them contrast |")
    print("|---|---|---|---|---|---|")
    for rows, answers in found.items():
        counted = answers[0]["flops"] / first[0]["flops"]
        share = answers[0]["contrast"] / answers[0]["flops"]
        print(f"| {rows} | {_against(answers, first)} | {counted:.2f} | {share:.3%} |")


def print_devices(found: dict[str, list[Answer]]) -> None:
    """``found``: of each number of devices, at the same batch."""
    first = next(iter(found.values()))
    print(f"| devices, {FIXED} pairs | ms | times the first (median of rounds) | least .. most | processor time |")
    print("|---|---|---|---|---|")
    for devices, answers in found.items():
        work = statistics.median(_ratios(answers, first, "cpu_seconds"))
        print(f"| {devices} | {_against(answers, first)} | {work:.2f} |")
    print(f"\nlargest difference of a loss from that on one device: {loss_difference(found):.1e} of it")


def loss_difference(found: dict[str, list[Answer]]) -> float:
    """Every number of devices began with the same weights and saw the same batches."""
    first = next(iter(found.values()))
    return max(abs(ratio - 1) for answers in found.values() for ratio in _ratios(answers, first, "loss"))


def _ratios(answers: list[Answer], first: list[Answer], key: str) -> list[float]:
    return [a[key] / b[key] for a, b in zip(answers, first, strict=True)]


def _against(answers: list[Answer], first: list[Answer]) -> str:
    ratios = _ratios(answers, first, "seconds")
    middle = statistics.median(answer["seconds"] for answer in answers) * 1e3
    return f"{middle:.0f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} .. {max(ratios):.2f}"


def print_contrast(size: str) -> None:
    print("| pairs | TFLOP a step | GFLOP a pair | contrast, GFLOP | share |\n|---|---|---|---|---|")
    for rows in PAPER:
        whole, part = step_flops(size, rows), contrast_flops(model_config(size), rows)
        print(f"| {rows} | {whole / 1e12:.1f} | {whole / rows / 1e9:.1f} | {part / 1e9:.2f} | {part / whole:.4%} |")


def print_speed(found: Sequence[Answer], rows: int) -> None:
    print(
        "| pairs | pairs/s | GFLOP a pair | share of the device's peak (MFU) | peak memory, GB |\n|---|---|---|---|---|"
    )
    seconds, one = statistics.median(answer["seconds"] for answer in found), found[0]
    share = f"{one['flops'] / seconds / one['peak_flops']:.1%}" if one["peak_flops"] else "unknown"
    memory = max(answer["peak_mb"] for answer in found) / 1e3
    print(f"| {rows} | {rows / seconds:.1f} | {one['flops'] / rows / 1e9:.4g} | {share} | {memory:.2f} |")


if __name__ == "__main__":
    main()
