"""Our models beside PyTorch `transformers`: the same weights, float32, one process each, interleaved runs.

    python benchmarks/side_by_side.py [--rounds 7] [--layers 12] [--width 1024]

Each side runs in its own process and waits while the other one works. A round measures every task once
on each side, in alternating order; the table gives medians and the median of the rounds' ratios
(PyTorch's time / ours: above 1 we are faster). Decoding is the time of N new tokens less that of one,
divided by N - 1, both through the public way: `generate` there, `Engine.run` here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TASKS = {
    "encode 1 picture": ("encode", {"rows": 1}),
    "encode 4 pictures": ("encode", {"rows": 4}),
    "prefill 1 x 256": ("generate", {"rows": 1, "length": 256, "new": 1}),
    "prefill 4 x 256": ("generate", {"rows": 4, "length": 256, "new": 1}),
    "decode 1 row, a token": ("decode", {"rows": 1, "length": 64, "new": 33}),
    "decode 8 rows, a token": ("decode", {"rows": 8, "length": 64, "new": 33}),
}
VOCAB = 32000
HEAD_DIM = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve(SIDES[args.side](args.models))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        write_models(models, args.layers, args.width)
        report(measure(models, args.rounds), args)


# --- the driver ------------------------------------------------------------------------------------------


def measure(models: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every task on each side, a list over the rounds; the first round warms up and is dropped."""
    sides = {side: start_side(side, models) for side in SIDES}
    seconds: dict[str, dict[str, list[float]]] = {task: {side: [] for side in SIDES} for task in TASKS}
    for number in range(rounds + 1):
        order = list(SIDES) if number % 2 else list(reversed(SIDES))
        for task, (action, fields) in TASKS.items():
            for side in order:
                taken = ask(sides[side], {"action": action, **fields, "seed": number})
                if number:
                    seconds[task][side].append(taken)
        print(f"round {number} of {rounds}" + (" (warm-up)" if number == 0 else ""), file=sys.stderr, flush=True)
    for process in sides.values():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
    return seconds


def start_side(side: str, models: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--side", side, "--models", str(models)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen[str], task: dict[str, Any]) -> float:
    process.stdin.write(json.dumps(task) + "\n")  # type: ignore[union-attr]
    process.stdin.flush()  # type: ignore[union-attr]
    answer = process.stdout.readline()  # type: ignore[union-attr]
    if not answer:
        raise SystemExit(f"a side stopped while doing {task}")
    return json.loads(answer)["seconds"]


def report(seconds: dict[str, dict[str, list[float]]], args: argparse.Namespace) -> None:
    print(f"{args.layers} layers of {args.width}, float32, {os.cpu_count()} cores ({platform.machine()}), ", end="")
    print(f"{args.rounds} interleaved rounds, {time.strftime('%Y-%m-%d')}\n")
    print("| task | PyTorch, ms | ours, ms | ratio (median of rounds) | least .. most |")
    print("|---|---|---|---|---|")
    for task, sides in seconds.items():
        torch_ms, jax_ms = (statistics.median(sides[side]) * 1e3 for side in ("torch", "jax"))
        ratios = [theirs / ours for theirs, ours in zip(sides["torch"], sides["jax"], strict=True)]
        row = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} .. {max(ratios):.2f}"
        print(f"| {task} | {torch_ms:.1f} | {jax_ms:.1f} | {row} |")


# --- the two sides ---------------------------------------------------------------------------------------


def write_models(models: Path, layers: int, width: int) -> None:
    """Random Hugging Face models, and what our converter makes of them."""
    import torch
    from transformers import Blip2Config, Blip2ForImageTextRetrieval, LlamaConfig, LlamaForCausalLM

    from mgpt4_jax.convert.convert import convert

    torch.manual_seed(0)
    heads = width // HEAD_DIM
    llama = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=VOCAB,
        eos_token_id=None,
    )
    LlamaForCausalLM(llama).save_pretrained(models / "llm")
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    vision |= {"num_attention_heads": heads, "image_size": 224, "patch_size": 14}
    qformer = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    qformer |= {"encoder_hidden_size": width, "vocab_size": 100, "use_qformer_text_input": True}
    blip2 = Blip2Config(vision_config=vision, qformer_config=qformer, image_text_hidden_size=32)
    Blip2ForImageTextRetrieval(blip2).save_pretrained(models / "blip2")
    overrides = {"vit": {"num_heads": heads}, "qformer": {"num_heads": 4}}
    convert(llm=models / "llm", out=models / "llm_jax")
    convert(from_dir=models / "blip2", overrides=overrides, out=models / "blip2_jax")


def serve(run: Callable[..., float]) -> None:
    """Answer tasks from stdin, one JSON line each, with the seconds that the work took."""
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps({"seconds": run(**task)}), flush=True)


def pictures(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 224, 224, 3), dtype=np.float32)


def prompts(rows: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, length)).astype(np.int32)


def torch_side(models: Path) -> Callable[..., float]:
    import torch
    from transformers import Blip2ForImageTextRetrieval, LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(models / "llm", dtype=torch.float32).eval()
    vit = Blip2ForImageTextRetrieval.from_pretrained(models / "blip2", dtype=torch.float32).vision_model.eval()

    @torch.inference_mode()
    def run(action: str, rows: int, seed: int, length: int = 0, new: int = 0) -> float:
        if action == "encode":
            pixels = torch.tensor(pictures(rows, seed).transpose(0, 3, 1, 2).copy())
            return timed(lambda: vit(pixels))
        ids = torch.tensor(prompts(rows, length, seed))

        def generate(count: int) -> None:
            llama.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)

        return per_token(generate, new) if action == "decode" else timed(lambda: generate(new))

    return run


def jax_side(models: Path) -> Callable[..., float]:
    import jax
    import jax.numpy as jnp

    from mgpt4_jax.checkpoint import load_params, read_manifest
    from mgpt4_jax.generate.engine import Engine, Request
    from mgpt4_jax.generate.sampling import SamplingParams
    from mgpt4_jax.models import build

    blip2 = build(read_manifest(models / "blip2_jax").config)
    vision = load_params(models / "blip2_jax", jnp.float32)
    encode = jax.jit(lambda params, pixels: blip2.apply({"params": params}, pixels, method="encode_pixels"))
    config = read_manifest(models / "llm_jax").config
    engine = Engine(config, load_params(models / "llm_jax", jnp.float32), slots=8, eos_ids=())

    def run(action: str, rows: int, seed: int, length: int = 0, new: int = 0) -> float:
        if action == "encode":
            pixels = pictures(rows, seed)
            return timed(lambda: jax.block_until_ready(encode(vision, pixels)))
        ids = prompts(rows, length, seed)

        def generate(count: int) -> None:
            sampling = SamplingParams(max_new_tokens=count)
            requests = [Request(row, np.full(length, -1, np.int32), None, sampling) for row in ids]
            assert sum(len(update.ids) for update in engine.run(requests, chunk=32)) == rows * count

        return per_token(generate, new) if action == "decode" else timed(lambda: generate(new))

    return run


def per_token(generate: Callable[[int], None], new: int) -> float:
    return (timed(lambda: generate(new)) - timed(lambda: generate(1))) / (new - 1)


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


SIDES: dict[str, Callable[[Path], Callable[..., float]]] = {"torch": torch_side, "jax": jax_side}

if __name__ == "__main__":
    main()
