"""Both tokenisers: the ids of special tokens, and BERT's batches of the recorded texts."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Case, all_cases, recorded
from claims import CHECKED, SPECIAL_IDS, is_checked
from comparing import Compare

from mgpt4_jax.data.text import load_bert_tokenizer, load_llama_tokenizer

_ATTRIBUTES = {"bos": "bos_id", "eos": "eos_id", "pad_token_id": "pad_id", "dec_token_id": "dec_id"}
_READING = [case for case in all_cases() if case.text_tokenizer or case.language_model]
_SPECIAL = [
    param
    for kind in CHECKED
    for param in recorded(kind, *SPECIAL_IDS)
    if is_checked(*param.values) and param.values[0] in _READING
]
_TEXTS = [pytest.param(case, id=str(case)) for case in _READING if case.text_tokenizer and "texts" in case.config]


@pytest.mark.parametrize(("case", "quantity"), _SPECIAL)
def test_special_ids(case: Case, quantity: str, compare: Compare) -> None:
    name = quantity.removeprefix("config.")
    language = case.language_model
    tokenizer: Any = load_bert_tokenizer(case.text_tokenizer) if language is None else load_llama_tokenizer(language)
    compare.equal(getattr(tokenizer, _ATTRIBUTES[name]), case.config[name])


@pytest.mark.parametrize("case", _TEXTS)
def test_text_ids(case: Case, compare: Compare) -> None:
    ids, mask = case.inputs["text_ids"], case.inputs["text_mask"] > 0
    batch = load_bert_tokenizer(case.text_tokenizer).encode_batch(case.config["texts"], max_length=ids.shape[1])
    compare.equal((batch.ids.tolist(), batch.mask.tolist()), (ids.tolist(), mask.tolist()))
