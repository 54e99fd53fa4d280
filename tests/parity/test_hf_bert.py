"""Where stage 1 begins: a BERT of ``transformers`` as the text side of our Q-Former, and what is drawn beside it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from mgpt4_jax import cli
from mgpt4_jax.api import load
from mgpt4_jax.checkpoint import flatten, load_params, read_manifest
from mgpt4_jax.convert.convert import convert
from mgpt4_jax.convert.inspect import inspect
from mgpt4_jax.models import build

VIT = Path(__file__).parent.parent / "golden" / "data" / "minigpt4_vicuna" / "eva_vit_g.pth"
WORDS, LAYERS, WIDTH, PLACES = 90, 5, 32, 120
OVERRIDES: dict[str, Any] = {"vit": {"num_heads": 4}, "qformer": {"num_queries": 6}, "projection_size": 16}


def write_bert(folder: Path, model: Any, *, old_names: bool = False) -> Path:
    """As published: safetensors, or a .bin that calls norms as TensorFlow does; with the word pieces."""
    if old_names:
        folder.mkdir()
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        state = {
            next((key.replace(new, old) for new, old in names.items() if key.endswith(new)), key): tensor
            for key, tensor in model.state_dict().items()
        }
        torch.save(state, folder / "pytorch_model.bin")
        model.config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *(f"w{number}" for number in range(WORDS - len(special)))]
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    return folder


@pytest.fixture(scope="module")
def bert() -> Any:
    """Every parameter takes part; token types, which LAVIS's BERT lacks, are zero."""
    config = hf.BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=PLACES,
    )
    model, generator = hf.BertForPreTraining(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + name.endswith("Norm.weight"))
        model.bert.embeddings.token_type_embeddings.weight.zero_()
    return model


@pytest.fixture(scope="module")
def source(bert: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert") / "bert", bert)


@pytest.fixture(scope="module")
def model_dir(source: Path) -> Path:
    out = source.parent / "model"
    convert(vit=VIT, bert=source, out=out, overrides=OVERRIDES)
    return out


def test_text_passes_equal_berts(bert: Any, model_dir: Path) -> None:
    """Hidden states of every layer and word logits, with padding and more than 100 tokens."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, WORDS, (3, 110))
    valid = np.arange(110) < np.array([110, 64, 7])[:, None]
    with torch.no_grad():
        theirs = bert(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(valid).long(), output_hidden_states=True
        )
    params, module = load_params(model_dir), build(read_manifest(model_dir).config)

    def run(model: Any) -> Any:
        text = model.qformer(text_ids=ids, mask=valid[:, None]).text
        return text, model.qformer.lm_logits(text)

    (text, logits), seen = module.apply({"params": params}, method=run, mutable="intermediates")
    assert theirs.hidden_states[-1].std() > 0.1
    hidden = flatten(seen["intermediates"]["qformer"])
    layers = [hidden[f"layers/layer_{index % 2}/hidden/0"][index // 2] for index in range(LAYERS - 1)]
    layers.append(hidden["tail/layer_0/hidden/0"])
    for ours, other in zip([hidden["embedded/0"], *layers], theirs.hidden_states, strict=True):
        np.testing.assert_allclose(np.asarray(ours)[valid], other.numpy()[valid], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(text)[valid], theirs.hidden_states[-1].numpy()[valid], rtol=1e-4, atol=1e-4)
    expected = theirs.prediction_logits.numpy()
    np.testing.assert_allclose(np.asarray(logits)[valid][:, :WORDS], expected[valid], rtol=1e-4, atol=1e-4)


def test_what_bert_lacks_begins_as_in_the_original(bert: Any, model_dir: Path) -> None:
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(load_params(model_dir)).items()}
    for path, leaf in leaves.items():
        if "query_mlp" in path:
            np.testing.assert_array_equal(leaf, leaves[path.replace("query_mlp", "text_mlp")], err_msg=path)
        if "/cross_attn/" in path and path.endswith("kernel"):
            assert (leaf.mean(), leaf.std()) == (pytest.approx(0, abs=2e-3), pytest.approx(0.02, rel=0.05)), path
        if "/cross_attn/" in path and path.endswith(("bias", "scale")):
            np.testing.assert_array_equal(leaf, float(path.endswith("scale")), err_msg=path)
        if path.split("/")[0] in ("vision_proj", "text_proj", "itm_head"):
            bound = WIDTH**-0.5
            assert np.abs(leaf).max() <= bound and (leaf.size < 10 or np.abs(leaf).max() > 0.8 * bound), path
    words = leaves["qformer/embeddings/word/embedding"]
    np.testing.assert_array_equal(words[:-1], bert.bert.embeddings.word_embeddings.weight.detach().numpy())
    assert words.shape[0] == WORDS + 1 and 0.01 < words[-1].std() < 0.03
    assert leaves["qformer/lm_head/bias"][-1] == 0
    assert leaves["qformer/query_tokens"].std() == pytest.approx(0.02, rel=0.1)
    assert leaves["temp"] == np.float32(0.07)
    assert (
        leaves["ln_vision/scale"].min() == leaves["ln_vision/scale"].max() == 1 and not leaves["ln_vision/bias"].any()
    )
    assert not np.array_equal(leaves["vision_proj/kernel"], leaves["text_proj/kernel"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_old_names_and_a_bin_make_the_same_model(bert: Any, model_dir: Path, tmp_path: Path, dtype: Any) -> None:
    source = write_bert(tmp_path / "old", copy.deepcopy(bert).to(dtype), old_names=True)
    convert(vit=VIT, bert=source, out=tmp_path / "model", overrides=OVERRIDES)
    ours, expected = (flatten(load_params(path)) for path in (tmp_path / "model", model_dir))
    assert set(ours) == set(expected)
    for path, leaf in ours.items():
        tolerance = 0 if dtype == torch.float32 else 1e-3
        np.testing.assert_allclose(leaf, expected[path], rtol=tolerance, atol=tolerance, err_msg=path)


def test_the_command_says_what_was_copied_and_what_begins_random(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = tmp_path / "overrides.yaml"
    overrides.write_text(json.dumps(OVERRIDES))
    options = ["--vit", str(VIT), "--bert", str(source), "--out", str(tmp_path / "model")]
    assert cli.main(["convert", *options, "--overrides", str(overrides)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "each feed-forward of the queries begins as a copy of its twin of the text",
        "begins random, normal with 0.02",
        "a head that must be trained",
        "the Q-Former knows no kinds of segments",
        "BERT's next-sentence head",
        "blip2, template none",
    ):
        assert words in said, words
    assert "warning" not in said
    model = load(tmp_path / "model")
    assert (model.tokenizer.dec_id, model.tokenizer.vocab_size) == (WORDS, WORDS + 1)
    assert model.embed_texts(["w1 w2", "w3"]).shape == (2, 16)


def test_a_bert_directory_says_what_it_can_become(source: Path) -> None:
    found = inspect(source)
    assert found.what == "Hugging Face BERT with its prediction head"
    assert "--bert" in found.can_become[0]
