"""A tiny InstructBLIP on either language model, of random weights, with the recorded tokenisers."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from tiny import LLAMA, QFORMER, VIT, random_params

from mgpt4_jax.checkpoint import new_directory, write_model
from mgpt4_jax.config import ModelConfig, T5Config
from mgpt4_jax.data.generative_rows import InstructRows
from mgpt4_jax.models import num_parameters
from mgpt4_jax.train_config import TextConfig

GOLDEN = Path(__file__).parent.parent / "golden" / "data"
TOKENIZERS = {"llama": GOLDEN / "minigpt4_vicuna" / "llm", "t5": GOLDEN / "blip2_t5" / "t5_tokenizer"}
BERT = GOLDEN / "qformer" / "bert_tokenizer"
BERT_VOCAB, VOCAB = 128, 480
READER = dataclasses.replace(QFORMER, with_text=True, vocab_size=BERT_VOCAB, max_positions=128)
T5 = T5Config(
    vocab_size=VOCAB, hidden_size=32, mlp_size=64, num_layers=2, num_decoder_layers=2, num_heads=4, head_dim=8
)
MODELS = {
    "llama": ModelConfig("instructblip", VIT, READER, dataclasses.replace(LLAMA, vocab_size=VOCAB)),
    "t5": ModelConfig("blip2_t5", VIT, READER, t5=T5),
}


def rows_of(kind: str, tokens_per_image: int = READER.num_queries, **text: object) -> InstructRows:
    config = TextConfig(**{"end_symbol": "</s>", "max_text_length": 24, "max_prompt_length": 16, **text})
    return InstructRows(TOKENIZERS[kind], BERT, config, tokens_per_image, kind == "t5")


def write_instruct_model(out: Path, kind: str, seed: int = 0) -> Path:
    config = MODELS[kind]
    template = "instructblip" if kind == "llama" else "blip2"
    with new_directory(out) as partial:
        fields = {"config": config, "template": template, "num_parameters": num_parameters(config)}
        write_model(partial, random_params(config, seed), fields)
        for name, source in (("tokenizer", TOKENIZERS[kind]), ("qformer_tokenizer", BERT)):
            (partial / name).mkdir()
            for file in source.iterdir():
                if file.name.startswith(("tokenizer", "special", "spiece", "vocab", "added")):
                    shutil.copyfile(file, partial / name / file.name)
    return out
