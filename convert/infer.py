"""Find out from the files what model they make, and which table reads which file.

Shapes and ``config.json`` tell almost everything. What they cannot tell (the number of heads) is known
for the published widths; for any other the error names the override to give. Nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping

from mgpt4_jax.errors import UserError

from .bert import infer_bert
from .huggingface import infer_hugging_face
from .inferred import PARTS, Inferred, Overrides
from .language import KINDS
from .lavis import LavisFiles
from .readers import Source


def infer(
    sources: Mapping[str, Source],
    overrides: Overrides | None = None,
    *,
    allow_llm_mismatch: bool = False,
    seed: int = 0,
) -> Inferred:
    """``sources`` by role: vit, qformer, llm, projection; vit and bert; or model (a whole Hugging Face directory).

    ``seed``: of a projection that no file holds, which begins random.

    Raises ``UserError`` for parts that do not belong together or are not supported.
    """
    overrides = overrides or {}
    for part in PARTS:
        if not isinstance(fields := overrides.get(part, {}), Mapping):
            raise UserError(f"overrides: {part} must map fields to values, such as {{num_heads: 4}}; got {fields!r}")
    model = sources.get("model")
    if "bert" in sources:
        result = infer_bert(sources, overrides)
    elif model is None:
        result = LavisFiles(sources, overrides, allow_llm_mismatch, seed).infer()
    elif (model.config or {}).get("model_type") in KINDS:
        result = LavisFiles({"llm": model}, overrides, allow_llm_mismatch).infer()
    else:
        result = infer_hugging_face(model, overrides)
    for part in overrides:
        if part in PARTS and getattr(result.config, part) is None:
            result.warnings.append(f"the overrides of {part} have no effect: this model has no {part}")
    return result
