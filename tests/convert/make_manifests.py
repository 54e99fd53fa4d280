"""Write ``manifests/*.json``: keys and shapes of the real published files, without their weights.

    python tests/convert/make_manifests.py

The files of LAVIS and MiniGPT-4 are listed by hand, from the state dicts of the original programs (LAVIS
@ 506965b, MiniGPT-4 @ d94738a, built on the meta device); those of Hugging Face by ``transformers``,
also on the meta device. In a key, ``{0-38}`` or ``{0,2,4}`` stands for each of these numbers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "manifests"
Shapes = dict[str, list[int]]


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}


def norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": [size], f"{name}.bias": [size]}


def eva(prefix: str = "", blocks: int = 40, positions: int = 257, *, whole: bool = True) -> Shapes:
    """``eva_vit_g.pth``: 40 blocks and EVA's own end; in combined LAVIS files 39 blocks and no end."""
    d, f, block = 1408, 6144, f"{prefix}blocks.{{0-{blocks - 1}}}"
    shapes = {
        f"{prefix}cls_token": [1, 1, d],
        f"{prefix}pos_embed": [1, positions, d],
        f"{prefix}patch_embed.proj.weight": [d, 3, 14, 14],
        f"{prefix}patch_embed.proj.bias": [d],
        **norm(f"{block}.norm1", d),
        f"{block}.attn.q_bias": [d],
        f"{block}.attn.v_bias": [d],
        f"{block}.attn.qkv.weight": [3 * d, d],
        **linear(f"{block}.attn.proj", d, d),
        **norm(f"{block}.norm2", d),
        **linear(f"{block}.mlp.fc1", f, d),
        **linear(f"{block}.mlp.fc2", d, f),
    }
    return shapes | (norm("norm", d) | linear("head", 1024, d) if whole else {})


def qformer(*, text: bool, heads: bool | None = None) -> Shapes:
    """``text``: with its text side; ``heads``: with those of stage 1, by default if it has a text side."""
    heads = text if heads is None else heads
    d, f, e, v = 768, 3072, 1408, 30523
    bert, layer, crossed = (
        "Qformer.bert",
        "Qformer.bert.encoder.layer.{0-11}",
        "Qformer.bert.encoder.layer.{0,2,4,6,8,10}",
    )
    shapes = {"query_tokens": [1, 32, d], f"{bert}.embeddings.position_ids": [1, 512]}
    shapes |= norm(f"{bert}.embeddings.LayerNorm", d)
    for name in ("query", "key", "value"):
        shapes |= linear(f"{layer}.attention.self.{name}", d, d)
        shapes |= linear(f"{crossed}.crossattention.self.{name}", d, d if name == "query" else e)
    for name in (f"{layer}.attention", f"{crossed}.crossattention"):
        shapes |= linear(f"{name}.output.dense", d, d) | norm(f"{name}.output.LayerNorm", d)
    for suffix in ("_query", "") if text else ("_query",):
        shapes |= linear(f"{layer}.intermediate{suffix}.dense", f, d) | linear(f"{layer}.output{suffix}.dense", d, f)
        shapes |= norm(f"{layer}.output{suffix}.LayerNorm", d)
    shapes |= norm("ln_vision", e)
    if text:
        shapes |= {
            f"{bert}.embeddings.word_embeddings.weight": [v, d],
            f"{bert}.embeddings.position_embeddings.weight": [512, d],
        }
    if heads:
        head = "Qformer.cls.predictions"
        shapes |= {
            f"{head}.bias": [v],
            **linear(f"{head}.transform.dense", d, d),
            **norm(f"{head}.transform.LayerNorm", d),
        }
        shapes |= {f"{head}.decoder.weight": [v, d], f"{head}.decoder.bias": [v], "temp": []}
        shapes |= linear("vision_proj", 256, d) | linear("text_proj", 256, d) | linear("itm_head", 2, d)
    return shapes


def bert() -> Shapes:
    """``pytorch_model.bin`` of bert-base-uncased: norms have the names of TensorFlow."""
    d, f, v = 768, 3072, 30522
    layer, head = "bert.encoder.layer.{0-11}", "cls.predictions"

    def old_norm(name: str) -> Shapes:
        return {f"{name}.gamma": [d], f"{name}.beta": [d]}

    words = {"word": v, "position": 512, "token_type": 2}
    shapes: Shapes = {f"bert.embeddings.{name}_embeddings.weight": [rows, d] for name, rows in words.items()}
    shapes |= old_norm("bert.embeddings.LayerNorm")
    for name in ("self.query", "self.key", "self.value", "output.dense"):
        shapes |= linear(f"{layer}.attention.{name}", d, d)
    shapes |= old_norm(f"{layer}.attention.output.LayerNorm") | old_norm(f"{layer}.output.LayerNorm")
    shapes |= linear(f"{layer}.intermediate.dense", f, d) | linear(f"{layer}.output.dense", d, f)
    shapes |= linear("bert.pooler.dense", d, d) | linear("cls.seq_relationship", 2, d)
    shapes |= {f"{head}.bias": [v], f"{head}.decoder.weight": [v, d]}
    return shapes | linear(f"{head}.transform.dense", d, d) | old_norm(f"{head}.transform.LayerNorm")


BERT_CONFIG = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}


def llama(size: int, mlp: int, layers: int, vocab: int, *, kv: int | None = None, buffers: bool = False) -> Shapes:
    """``LlamaForCausalLM`` as saved; ``buffers`` adds what transformers <= 4.30 saved too."""
    layer = f"model.layers.{{0-{layers - 1}}}"
    shapes = {"model.embed_tokens.weight": [vocab, size]}
    for name, outputs in (("q", size), ("k", kv or size), ("v", kv or size), ("o", size)):
        shapes[f"{layer}.self_attn.{name}_proj.weight"] = [outputs, size]
    if buffers:
        shapes[f"{layer}.self_attn.rotary_emb.inv_freq"] = [64]
    shapes |= {f"{layer}.mlp.{name}_proj.weight": [mlp, size] for name in ("gate", "up")}
    shapes[f"{layer}.mlp.down_proj.weight"] = [size, mlp]
    shapes |= {f"{layer}.{name}_layernorm.weight": [size] for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": [size], "lm_head.weight": [vocab, size]}


def llama_config(size: int, mlp: int, layers: int, heads: int, vocab: int, **fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": size,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        **fields,
    }


SIZES = {
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "33b": (6656, 17920, 60, 52),
    "65b": (8192, 22016, 80, 64),
}
LLAMA2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def hand_written() -> dict[str, dict[str, Any]]:
    projection = lambda outputs, inputs=768: linear("llama_proj", outputs, inputs)  # noqa: E731
    position_ids = {"Qformer.bert.embeddings.position_ids": [1, 512]}
    rotary = {"llama_model.model.layers.{0-31}.self_attn.rotary_emb.inv_freq": [64]}
    files = {
        "eva_vit_g": {"shapes": eva()},
        "bert_base_uncased": {"shapes": bert(), "config": BERT_CONFIG},
        "blip2_pretrained": {"shapes": qformer(text=True)},
        "blip2_pretrained_flant5xxl": {"shapes": qformer(text=False) | linear("t5_proj", 4096, 768)},
        "blip2_pretrained_flant5xl": {"shapes": qformer(text=False) | linear("t5_proj", 2048, 768)},
        "blip2_pretrained_opt2.7b": {"shapes": qformer(text=False) | linear("opt_proj", 2560, 768)},
        "blip2_pretrained_opt6.7b": {"shapes": qformer(text=False) | linear("opt_proj", 4096, 768)},
        "instruct_blip_flanxl_trimmed": {"shapes": qformer(text=True, heads=False) | linear("t5_proj", 2048, 768)},
        "blip2_finetune_coco": {"shapes": qformer(text=True) | eva("visual_encoder.", 39, 677, whole=False)},
        "pretrained_minigpt4_13b": {"shapes": projection(5120)},
        "pretrained_minigpt4_7b": {"shapes": projection(4096) | position_ids | rotary},
        "pretrained_minigpt4_llama2_7b": {"shapes": projection(4096, 5632)},
        "checkpoint_stage1_13b": {
            "shapes": projection(5120) | position_ids,
            "wrapper": ["optimizer", "config", "scaler", "epoch"],
        },
    }
    for name, (size, mlp, layers, heads) in SIZES.items():
        config = llama_config(size, mlp, layers, heads, 32000)
        files[f"llama_{name}"] = {"shapes": llama(size, mlp, layers, 32000), "config": config}
    for name in ("7b", "13b"):
        size, mlp, layers, heads = SIZES[name]
        config = llama_config(size, mlp, layers, heads, 32001)
        files[f"vicuna_{name}_v0"] = {"shapes": llama(size, mlp, layers, 32001, buffers=True), "config": config}
    size, mlp, layers, heads = SIZES["7b"]
    config = llama_config(size, mlp, layers, heads, 32000, **LLAMA2)
    files["llama2_7b_chat"] = {"shapes": llama(size, mlp, layers, 32000, buffers=True), "config": config}
    config = llama_config(8192, 28672, 80, 64, 32000, num_key_value_heads=8, **LLAMA2)
    files["llama2_70b"] = {"shapes": llama(8192, 28672, 80, 32000, kv=1024), "config": config}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    config = llama_config(4096, 14336, 32, 32, 128256, num_key_value_heads=8, rms_norm_eps=1e-5)
    config |= {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": scaling}
    files["llama31_8b"] = {"shapes": llama(4096, 14336, 32, 128256, kv=1024), "config": config}
    return files


def opt_config(size: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "hidden_size": size,
        "word_embed_proj_dim": size,
        "ffn_dim": 4 * size,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
    }


def t5_config(size: int, mlp: int, heads: int, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "d_model": size,
        "d_kv": 64,
        "d_ff": mlp,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "vocab_size": 32128,
        **fields,
    }


XL, XXL = (2048, 5120, 32), (4096, 10240, 64)


def language_models() -> dict[str, dict[str, Any]]:
    """OPT and FlanT5: ``config.json`` as published, keys and shapes by ``transformers``."""
    import transformers as hf

    configs = {
        "opt_2.7b": opt_config(2560),
        "opt_6.7b": opt_config(4096),
        "flan_t5_xl": t5_config(*XL),
        "flan_t5_xxl": t5_config(*XXL),
    }
    files = {}
    for name, values in configs.items():
        is_opt = values["model_type"] == "opt"
        config = hf.OPTConfig(**values) if is_opt else hf.T5Config(**values)
        files[name] = {
            "shapes": on_meta(hf.OPTForCausalLM if is_opt else hf.T5ForConditionalGeneration, config),
            "config": values,
        }
    return files


def on_meta(model: Any, config: Any) -> Shapes:
    import torch

    with torch.device("meta"):
        state = model(config).state_dict()
    return compact({key: list(tensor.shape) for key, tensor in state.items()})


def from_transformers() -> dict[str, dict[str, Any]]:
    import transformers as hf

    vicuna = hf.LlamaConfig(vocab_size=32001).to_dict()
    opt, t5 = opt_config(2560), t5_config(*XL, dense_act_fn="gelu")
    instructed = {"vocab_size": 30523}
    reader = {"vocab_size": 30523, "use_qformer_text_input": True}
    made = {
        "hf_blip2_itm_vit_g": (
            hf.Blip2ForImageTextRetrieval,
            hf.Blip2Config(image_text_hidden_size=256, qformer_config=reader),
        ),
        "hf_blip2_opt_2.7b": (hf.Blip2ForConditionalGeneration, hf.Blip2Config(text_config=opt)),
        "hf_blip2_flan_t5_xl": (hf.Blip2ForConditionalGeneration, hf.Blip2Config(text_config=t5)),
        "hf_instructblip_vicuna_7b": (
            hf.InstructBlipForConditionalGeneration,
            hf.InstructBlipConfig(text_config=vicuna, qformer_config=instructed),
        ),
        "hf_instructblip_flan_t5_xl": (
            hf.InstructBlipForConditionalGeneration,
            hf.InstructBlipConfig(text_config=t5, qformer_config=instructed),
        ),
    }
    files = {}
    for name, (model, config) in made.items():
        values = config.to_dict()
        kept = {key: values[key] for key in ("model_type", "vision_config", "qformer_config", "text_config")}
        files[name] = {
            "shapes": on_meta(model, config),
            "config": {key: slim(value) for key, value in kept.items()},
        }
    for name, text in (("blip2_opt_2.7b", opt), ("blip2_flan_t5_xl", t5), ("instructblip_flan_t5_xl", t5)):
        files[f"hf_{name}"]["config"]["text_config"] = text  # as published, not as transformers 5 rewrites it
    return files


def slim(values: Any) -> Any:
    """Of a nested config only what says something about the model."""
    words = ("size", "num_", "eps", "act", "bias", "model_type", "frequency", "rope", "tie", "positions", "d_", "head")
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if any(word in key for word in words) and value is not None}


def compact(shapes: Shapes) -> Shapes:
    """Keys that differ in their first number only, with the same shape, become one."""
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for key, shape in shapes.items():
        match = re.search(r"\.(\d+)\.", key)
        template = key if match is None else key.replace(match[0], ".{}.", 1)
        groups.setdefault((template, tuple(shape)), []).append(-1 if match is None else int(match[1]))
    result: Shapes = {}
    for (template, shape), numbers in groups.items():
        is_run = numbers == list(range(numbers[0], numbers[-1] + 1))
        text = f"{numbers[0]}-{numbers[-1]}" if is_run else ",".join(map(str, numbers))
        result[template.replace("{}", f"{{{text}}}")] = list(shape)
    return result


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for name, values in (hand_written() | language_models() | from_transformers()).items():
        lines = [f"  {json.dumps(key)}: {json.dumps(shape)}" for key, shape in values.pop("shapes").items()]
        head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in values.items())
        text = "{\n" + head + ' "shapes": {\n' + ",\n".join(lines) + "\n }\n}\n"
        (HERE / f"{name}.json").write_text(text)
        print(f"{name}: {len(lines)} lines")


if __name__ == "__main__":
    main()
