"""``mgpt4 inspect``, ``convert``, ``verify`` and ``export``: weights, from PyTorch and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from mgpt4_jax.commands import Commands, console, read_yaml
from mgpt4_jax.errors import UserError
from mgpt4_jax.progress import progress

_SOURCES = ("vit", "qformer", "llm", "llm_delta", "projection", "from_dir")


def _add_inspect(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a weight file, a Hugging Face directory or a model directory")


def _inspect(arguments: Namespace) -> int:
    from mgpt4_jax.convert.inspect import inspect

    console().print(inspect(arguments.path))
    return 0


def _add_sources(parser: ArgumentParser) -> None:
    parser.add_argument("--vit", type=Path, help="eva_vit_g.pth")
    parser.add_argument("--qformer", type=Path, help="blip2_pretrained*.pth")
    parser.add_argument("--llm", type=Path, help="Hugging Face directory of Vicuna, LLaMA, OPT or FlanT5")
    parser.add_argument("--llm-delta", type=Path, help="Vicuna delta weights, added to --llm")
    parser.add_argument("--projection", type=Path, help="pretrained_minigpt4*.pth or checkpoint_N.pth")
    parser.add_argument(
        "--from",
        dest="from_dir",
        type=Path,
        metavar="DIR",
        help="a whole Hugging Face directory: Blip2, InstructBlip, LLaMA, OPT or T5",
    )


def _add_convert(parser: ArgumentParser) -> None:
    _add_sources(parser)
    parser.add_argument("--bert", type=Path, help="directory of bert-base-uncased: where BLIP-2 stage 1 begins")
    parser.add_argument("--out", type=Path, required=True, help="the model directory to write")
    parser.add_argument("--template", help="conversation template: vicuna_v0, llama2, ... (guessed from the files)")
    parser.add_argument("--overrides", type=Path, help="YAML of what files of unusual sizes cannot tell")
    parser.add_argument("--image-size", type=int, help="resize the position embeddings to it")
    parser.add_argument("--tokenizer", type=Path, help="directory of the language model's tokeniser")
    parser.add_argument("--qformer-tokenizer", type=Path, help="directory with BERT's vocab.txt")
    parser.add_argument(
        "--allow-llm-mismatch",
        action="store_true",
        help="join a projection to a language model that it was not trained with",
    )
    parser.add_argument("--seed", type=int, default=0, help="of a projection that begins random (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model directory")


def _convert(arguments: Namespace) -> int:
    from mgpt4_jax.convert.convert import convert

    options = arguments.as_dict()
    options["overrides"] = read_overrides(options["overrides"])
    with progress("converting") as report:
        result = convert(**options, progress=report)
    console().print(result)
    return 0


def read_overrides(path: Path | None) -> dict[str, Any]:
    """The mapping in a YAML file such as ``configs/tiny_overrides.yaml``; {} without a file."""
    if path is None:
        return {}
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: must map parts to fields, for example 'vit: {{num_heads: 4}}'")
    return values


def _add_init(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML of the model's parts, as in configs/tiny/models"
    )
    parser.add_argument("--out", type=Path, required=True, help="the model directory to write")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (0)")
    parser.add_argument("--template", default="none", help="conversation template: vicuna_v0, llama2, ... (none)")
    parser.add_argument("--tokenizer", type=Path, help="directory of the language model's tokeniser")
    parser.add_argument("--qformer-tokenizer", type=Path, help="directory with BERT's vocab.txt")
    parser.add_argument("--places", type=float, default=1.0, help="how strong the tower's places begin (1)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model directory")


def _init(arguments: Namespace) -> int:
    from mgpt4_jax.config import model_config_from_dict
    from mgpt4_jax.initial import init_model

    options = arguments.as_dict()
    path = options.pop("config")
    values = read_overrides(path)
    if "architecture" not in values:
        raise UserError(f"{path}: names no architecture, for example 'architecture: llama'")
    try:
        config = model_config_from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    init_model(config, **options)
    print(options["out"])
    return 0


def _add_verify(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the model directory")
    _add_sources(parser)
    parser.add_argument("--golden", type=Path, help="a recorded case, whose numbers are compared too")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest error that passes (0.0001)")
    parser.add_argument("--json", type=Path, help="write the table there as JSON too")


def _verify(arguments: Namespace) -> int:
    from mgpt4_jax.convert.verify import verify

    sources = {name: arguments[name] for name in _SOURCES}
    with progress("verifying") as report:
        result = verify(
            arguments.model, **sources, golden=arguments.golden, tolerance=arguments.tolerance, progress=report
        )
    if arguments.json:
        arguments.json.write_text(result.to_json() + "\n")
    console().print(result)
    return 0 if result.passed else 1


def _add_export(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the model directory")
    parser.add_argument("--format", required=True, help="minigpt4 (one .pth), lavis or hf (directories)")
    parser.add_argument("--out", type=Path, required=True, help="what to write")
    parser.add_argument("--overwrite", action="store_true", help="replace it")


def _export(arguments: Namespace) -> int:
    from mgpt4_jax.convert.export import export

    with progress("exporting") as report:
        files = export(
            arguments.model,
            format=arguments.format,
            out=arguments.out,
            overwrite=arguments.overwrite,
            progress=report,
        )
    for file in files:
        print(file)
    return 0


COMMANDS: Commands = {
    "inspect": (_inspect, _add_inspect, "Say what a file is and what it can become.", "mgpt4 inspect eva_vit_g.pth"),
    "convert": (
        _convert,
        _add_convert,
        "Convert PyTorch weights to a model directory.",
        "mgpt4 convert --vit eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth --llm vicuna-7b "
        "--projection pretrained_minigpt4_7b.pth --out models/minigpt4-7b",
    ),
    "init": (
        _init,
        _add_init,
        "Begin a model of any size with random weights, to train it from nothing.",
        "mgpt4 init --config configs/tiny/models/llm.yaml --tokenizer world/tokenizer --template vicuna_v0 "
        "--out models/llm",
    ),
    "verify": (
        _verify,
        _add_verify,
        "Run PyTorch beside JAX on the same files, layer by layer.",
        "mgpt4 verify models/minigpt4-7b --vit eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth --llm vicuna-7b "
        "--projection pretrained_minigpt4_7b.pth",
    ),
    "export": (
        _export,
        _add_export,
        "Write a model in the layout of another program.",
        "mgpt4 export models/minigpt4-7b --format minigpt4 --out pretrained_minigpt4.pth",
    ),
}
