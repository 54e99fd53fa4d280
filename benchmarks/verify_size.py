"""A ViT-g of true size, random, in the layout of ``eva_vit_g.pth``: convert it and verify it against PyTorch.

    python benchmarks/verify_size.py --scratch DIR        (needs 6 GB there)

Prints the table of ``mgpt4 verify``, and the time and peak resident memory of both commands.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from convert_size import mgpt4

from mgpt4_jax.config import VitConfig, eva_vit_g


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, help="where 6 GB fit (default: a temporary directory)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        source, model = Path(scratch) / "eva_vit_g.pth", Path(scratch) / "model"
        write_checkpoint(eva_vit_g(), source)
        print(f"source: {source.stat().st_size / 1e9:.2f} GB", flush=True)
        for name, command in {"convert": ("--vit", source, "--out", model), "verify": (model, "--vit", source)}.items():
            seconds, peak = mgpt4(name, *command)
            print(f"{name}: {seconds:.1f} s, peak resident {peak:.2f} GB", flush=True)


def write_checkpoint(config: VitConfig, out: Path) -> None:
    """float16, with the 40th block and the head that the published file has and BLIP-2 does not use."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).half()

    d, f = config.hidden_size, config.mlp_size
    tensors = {
        "cls_token": normal(1, 1, d),
        "pos_embed": normal(1, config.num_positions, d),
        "patch_embed.proj.weight": normal(d, 3, config.patch_size, config.patch_size),
        "patch_embed.proj.bias": normal(d),
    }
    for layer in range(config.num_layers + 1):
        prefix = f"blocks.{layer}"
        for norm in ("norm1", "norm2"):
            tensors |= {f"{prefix}.{norm}.weight": 1 + normal(d), f"{prefix}.{norm}.bias": normal(d)}
        tensors |= {f"{prefix}.attn.q_bias": normal(d), f"{prefix}.attn.v_bias": normal(d)}
        tensors |= {f"{prefix}.attn.qkv.weight": normal(3 * d, d)}
        for name, (rows, columns) in {"attn.proj": (d, d), "mlp.fc1": (f, d), "mlp.fc2": (d, f)}.items():
            tensors |= {f"{prefix}.{name}.weight": normal(rows, columns), f"{prefix}.{name}.bias": normal(rows)}
    tensors |= {"norm.weight": 1 + normal(d), "norm.bias": normal(d)}
    tensors |= {"head.weight": normal(1000, d), "head.bias": normal(1000)}
    torch.save(tensors, out)


if __name__ == "__main__":
    main()
