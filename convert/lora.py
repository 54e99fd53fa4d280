"""Table of LoRA adapters as peft names them: beside ``llama_proj`` in the checkpoints of MiniGPT-v2.

peft 0.2 writes ``llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``; later ones put the
adapter's name, ``default``, before ``weight``. Rank and matrices are told by the keys, alpha is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mgpt4_jax.config import LlamaConfig, LoraConfig
from mgpt4_jax.errors import UserError

from .inferred import Overrides, shape_of
from .readers import Source
from .rules import Entry, Rule
from .transforms import Transform, heads_in, heads_out, transpose

ROOT = "{}_model.base_model.model."
"""What stands before ``model.layers`` in the files of MiniGPT-v2 ("llama") and InstructBLIP ("llm")."""

_KEY = re.compile(r"(.*\.|)model\.layers\.\d+\.((?:self_attn|mlp)\.\w+)\.lora_[AB](\.default|)\.weight")
# Our name of a matrix, and peft's.
_NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Adapters:
    """What the keys of a file tell of its adapters."""

    root: str
    infix: str  # "" or ".default"
    config: LoraConfig


def find_adapters(source: Source) -> Adapters | None:
    """The adapters of a file, if it has any; alpha is MiniGPT-v2's. Strange ones raise ``UserError``."""
    keys = [key for key in source.tensors() if ".lora_" in key]
    if not keys:
        return None
    matches = [match for key in keys if (match := _KEY.fullmatch(key))]
    places = {match[2] for match in matches}
    targets = tuple(target for target, name in _NAMES.items() if name in places)
    if not targets:
        raise UserError(f"{source.path}: {keys[0]} is LoRA of a kind that is not read; merge it and save the rest")
    first = next(match for match in matches if match[2] == _NAMES[targets[0]])
    rank = shape_of(source, re.sub(r"\.lora_[AB]", ".lora_A", first[0]), 2)[0]
    return Adapters(first[1], first[3], LoraConfig(rank=rank, targets=targets))


def assumed_alpha(overrides: Overrides) -> str | None:
    """A warning where nobody says alpha."""
    fields = overrides.get("llama", {}).get("lora") or {}
    if "alpha" in fields:
        return None
    return (
        f"no file tells LoRA's alpha: {LoraConfig().alpha:g} as in MiniGPT-v2 is taken; for another one give "
        "--overrides a YAML file with `llama: {lora: {alpha: N}}`"
    )


def lora(config: LlamaConfig, root: str, infix: str = "") -> list[Entry]:
    """torch's A [r in] and B [out r] of every matrix that ``config.lora`` targets."""
    d, f, n, k, h = config.hidden_size, config.mlp_size, config.num_heads, config.num_kv_heads, config.head_dim
    r = config.lora.rank
    plain = transpose()
    matrices: dict[str, tuple[int, int, Transform, Transform]] = {
        "query": (d, n * h, plain, heads_in(n)),
        "key": (d, k * h, plain, heads_in(k)),
        "value": (d, k * h, plain, heads_in(k)),
        "out": (n * h, d, heads_out(n), plain),
        "gate": (d, f, plain, plain),
        "up": (d, f, plain, plain),
        "down": (f, d, plain, plain),
    }
    table: list[Entry] = []
    for target in config.lora.targets:
        inputs, outputs, of_a, of_b = matrices[target]
        key, block = f"{root}model.layers.{{l}}.{_NAMES[target]}", "mlp" if "mlp" in _NAMES[target] else "attn"
        leaf, layers = f"llama/layers/{block}/{target}_lora", range(config.num_layers)
        table += [
            Rule(f"{key}.lora_A{infix}.weight", (f"{leaf}/a",), of_a, (r, inputs), layers),
            Rule(f"{key}.lora_B{infix}.weight", (f"{leaf}/b",), of_b, (outputs, r), layers),
        ]
    return table
