"""Convert a language model of true 7B size: resident memory, and time against copying the same files.

    python benchmarks/convert_size.py --scratch DIR        (needs 45 GB there; 15 GB of memory to generate)

Makes a Hugging Face directory of random bfloat16 weights in three shards, copies it, converts it with
``mgpt4 convert`` in a process of its own, answers one prompt with ``mgpt4 generate``, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from sentencepiece import sentencepiece_model_pb2

from mgpt4_jax.config import LlamaConfig, llama_7b

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "tests/golden/data/minigpt4_vicuna/llm/tokenizer.model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, help="where 45 GB fit (default: a temporary directory)")
    parser.add_argument("--layers", type=int, default=32, help="fewer layers make a smaller, quicker model")
    parser.add_argument("--new-tokens", type=int, default=2)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = llama_7b(num_layers=args.layers)
    if args.write:
        write_model(config, args.write)
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        measure(config, Path(scratch), args.new_tokens)


def measure(config: LlamaConfig, scratch: Path, new_tokens: int) -> None:
    source, model = scratch / "llm", scratch / "model"
    # In a process of its own: what a parent once held would count as the peak of its children.
    subprocess.run([sys.executable, __file__, "--layers", str(config.num_layers), "--write", source], check=True)
    shards = [file.stat().st_size for file in source.glob("*.safetensors")]
    print(f"source: {sum(shards) / 1e9:.2f} GB in {len(shards)} shards", flush=True)
    copy_s = timed(lambda: copy(source, scratch / "copy"))
    shutil.rmtree(scratch / "copy")
    print(f"copy: {copy_s:.1f} s", flush=True)
    convert_s, peak = mgpt4("convert", "--llm", source, "--out", model)
    print(f"convert: {convert_s:.1f} s = {convert_s / copy_s:.2f} x copy, peak resident {peak:.2f} GB", flush=True)
    questions, answers = scratch / "in.jsonl", scratch / "out.jsonl"
    questions.write_text(json.dumps({"id": 1, "prompt": "A", "max_new_tokens": new_tokens}) + "\n")
    ask = ("--input", questions, "--output", answers, "--dtype", "bfloat16")
    generate_s, peak = mgpt4("generate", model, *ask)
    print(f"load and generate {new_tokens} tokens: {generate_s:.1f} s, peak resident {peak:.2f} GB")
    print(f"answer: {answers.read_text().strip()}")


def write_model(config: LlamaConfig, out: Path) -> None:
    """Random weights in Hugging Face's layout. Values repeat a block, shifted for each tensor."""
    out.mkdir()
    block = (np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    shapes = tensor_shapes(config)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * int(np.prod(s)) for s in shards[-1].values()) > 4.9e9:
            shards.append({})
        shards[-1][name] = shape
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: filled(shape, block, seed) for seed, (name, shape) in enumerate(shard.items())}
        save_file(tensors, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (out / "config.json").write_text(json.dumps(hugging_face_config(config)))
    write_tokenizer(out / "tokenizer.model", config.vocab_size)


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    d, f, v = config.hidden_size, config.mlp_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.gate_proj.weight": (f, d), f"{prefix}.mlp.up_proj.weight": (f, d)}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (d, f)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (d,), "lm_head.weight": (v, d)}


def filled(shape: tuple[int, ...], block: np.ndarray, seed: int) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    return np.resize(np.roll(block, 7919 * seed), shape)


def hugging_face_config(config: LlamaConfig) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "torch_dtype": "bfloat16",
    }


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """The tiny tokeniser of the tests, filled up with unused pieces to the model's vocabulary."""
    model = sentencepiece_model_pb2.ModelProto.FromString(TOKENIZER.read_bytes())
    for number in range(len(model.pieces), vocab_size):
        model.pieces.add(piece=f"unused{number}", score=-float(number), type=1)
    path.write_bytes(model.SerializeToString())


def copy(source: Path, out: Path) -> None:
    shutil.copytree(source, out)
    os.sync()


def mgpt4(*arguments: object) -> tuple[float, float]:
    """Run a command in a process of its own: seconds, and its peak resident memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "mgpt4_jax.cli", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"mgpt4 {arguments[0]} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def timed(action: object) -> float:
    start = time.perf_counter()
    action()  # type: ignore[operator]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
