"""Our models beside PyTorch `transformers`: the same weights, float32, one process each, interleaved runs.

    python benchmarks/side_by_side.py [--rounds 7] [--layers 12] [--width 1024]

The table gives medians and the median of the rounds' ratios (PyTorch's time / ours: above 1 we are faster). Decoding is
the time of N new tokens less that of one, divided by N - 1, both through the public way: `generate` there, `Engine.run`
here.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from interleaved import SIDES, Answer, measure, print_table, serve, timed

TASKS = {
    "encode 1 picture": {"action": "encode", "rows": 1},
    "encode 4 pictures": {"action": "encode", "rows": 4},
    "prefill 1 x 256": {"action": "generate", "rows": 1, "length": 256, "new": 1},
    "prefill 4 x 256": {"action": "generate", "rows": 4, "length": 256, "new": 1},
    "decode 1 row, a token": {"action": "decode", "rows": 1, "length": 64, "new": 33},
    "decode 8 rows, a token": {"action": "decode", "rows": 8, "length": 64, "new": 33},
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
        serve({"torch": torch_side, "jax": jax_side}[args.side](args.models))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        write_models(models, args.layers, args.width)
        answers = measure(__file__, ["--models", str(models)], TASKS, args.rounds)
        print_table(answers, f"{args.layers} layers of {args.width}, float32")


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


def pictures(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 224, 224, 3), dtype=np.float32)


def prompts(rows: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, length)).astype(np.int32)


def torch_side(models: Path) -> Callable[..., Answer]:
    import torch
    from transformers import Blip2ForImageTextRetrieval, LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(models / "llm", dtype=torch.float32).eval()
    vit = Blip2ForImageTextRetrieval.from_pretrained(models / "blip2", dtype=torch.float32).vision_model.eval()

    @torch.inference_mode()
    def run(action: str, rows: int, seed: int, length: int = 0, new: int = 0) -> Answer:
        if action == "encode":
            pixels = torch.tensor(pictures(rows, seed).transpose(0, 3, 1, 2).copy())
            return {"seconds": timed(lambda: vit(pixels))}
        ids = torch.tensor(prompts(rows, length, seed))

        def generate(count: int) -> None:
            llama.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)

        return {"seconds": per_token(generate, new) if action == "decode" else timed(lambda: generate(new))}

    return run


def jax_side(models: Path) -> Callable[..., Answer]:
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

    def run(action: str, rows: int, seed: int, length: int = 0, new: int = 0) -> Answer:
        if action == "encode":
            pixels = pictures(rows, seed)
            return {"seconds": timed(lambda: jax.block_until_ready(encode(vision, pixels)))}
        ids = prompts(rows, length, seed)

        def generate(count: int) -> None:
            sampling = SamplingParams(max_new_tokens=count)
            requests = [Request(row, np.full(length, -1, np.int32), None, sampling) for row in ids]
            assert sum(len(update.ids) for update in engine.run(requests, chunk=32)) == rows * count

        return {"seconds": per_token(generate, new) if action == "decode" else timed(lambda: generate(new))}

    return run


def per_token(generate: Callable[[int], None], new: int) -> float:
    return (timed(lambda: generate(new)) - timed(lambda: generate(1))) / (new - 1)


if __name__ == "__main__":
    main()
