"""Trained models: directories of the trained parameters alone, which stand on a whole model."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore
import torch

from mgpt4_jax import checkpoint, cli
from mgpt4_jax.api import load
from mgpt4_jax.checkpoint import flatten, read_manifest, write_trained_model
from mgpt4_jax.config import LoraConfig, ModelConfig
from mgpt4_jax.convert.convert import convert
from mgpt4_jax.convert.export import export
from mgpt4_jax.convert.verify import verify
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.engine import Engine
from mgpt4_jax.models import abstract_params, num_parameters
from mgpt4_jax.models.lora import merging
from mgpt4_jax.sharding import make_mesh
from tests.generate.conftest import GOLDEN, model_dir, pictures  # noqa: F401  (fixtures)
from tests.tiny import MINIGPT4, random_params

LORA = LoraConfig(rank=3, alpha=6.0, targets=("query", "value", "down"))
ADAPTED = replace(MINIGPT4, llama=replace(MINIGPT4.llama, lora=LORA))
PROJECTION = ("projection/kernel", "projection/bias")


@cache
def as_leaves(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    return flatten(random_params(config, seed))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model, in bfloat16, with the folder of a tokeniser."""
    out = tmp_path_factory.mktemp("whole") / "models" / "base"
    params = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), random_params(MINIGPT4))
    with checkpoint.new_directory(out) as partial:
        fields = {"config": MINIGPT4, "template": "vicuna_v0", "num_parameters": num_parameters(MINIGPT4)}
        checkpoint.write_model(partial, params, fields)
        (partial / "tokenizer").mkdir()
        (partial / "tokenizer" / "words").write_text("a b c")
    return out


@pytest.fixture(scope="module")
def run(whole: Path) -> Path:
    """A projection and adapters that were trained on it."""
    out, leaves = whole.parent.parent / "run" / "model", as_leaves(ADAPTED, 1)
    write_trained_model(out, whole, {path: leaves[path] for path in leaves if is_trained(path)}, ADAPTED, "vicuna_v1")
    return out


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "models" / "base"))


@pytest.fixture
def trained(run: Path, base: Path, tmp_path: Path) -> Path:
    """A copy that stands on ``base``, which lies where it lay to the original."""
    return Path(shutil.copytree(run, tmp_path / "run" / "model"))


def is_trained(path: str) -> bool:
    return path in PROJECTION or "_lora/" in path


def expected() -> dict[str, np.ndarray]:
    """What ``trained`` should hold, in whose dtypes."""
    base, new = as_leaves(MINIGPT4, 0), as_leaves(ADAPTED, 1)
    return {path: new[path] if is_trained(path) else base[path].astype(ml_dtypes.bfloat16) for path in new}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert list(found) == list(wanted)
    for path, leaf in wanted.items():
        assert found[path].dtype == leaf.dtype, path
        assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path


def alter(model_dir: Path, path: str) -> None:  # noqa: F811
    """Another value, with a checksum that fits."""
    file = {"driver": "file", "path": str(model_dir / "params" / path.replace("/", "."))}
    store = tensorstore.open({"driver": "zarr3", "kvstore": file}).result()
    values = store.read().result()
    values.reshape(-1)[7] += 1
    store.write(values).result()


def test_it_holds_what_was_trained_and_reads_the_rest_from_its_base(trained: Path, base: Path) -> None:
    wanted = expected()
    assert_same(flatten(checkpoint.load_params(trained)), wanted)
    layer = checkpoint.read_leaf(trained, "llama/layers/mlp/up/kernel", 1)
    assert layer.tobytes() == wanted["llama/layers/mlp/up/kernel"][1].tobytes()
    stored = {path.name.replace(".", "/") for path in (trained / "params").iterdir() if path.is_dir()}
    assert stored == {path for path in wanted if is_trained(path)}
    manifest = read_manifest(trained)
    assert set(manifest.trained) == stored
    assert (manifest.config, manifest.template) == (ADAPTED, "vicuna_v1")
    assert manifest.num_parameters == num_parameters(ADAPTED)
    assert manifest.base is not None and manifest.base.path == "../../models/base"
    assert (trained / "tokenizer" / "words").read_text() == "a b c"
    size = sum(file.stat().st_size for file in trained.rglob("*") if file.is_file())
    assert size < 0.3 * sum(file.stat().st_size for file in base.rglob("*") if file.is_file())


def test_it_is_cut_over_a_mesh_in_the_dtypes_that_are_asked_for(trained: Path) -> None:
    loaded = checkpoint.load_params(
        trained,
        lambda path: jnp.float32 if is_trained(path) else jnp.bfloat16,
        make_mesh("fsdp=2,tensor=2"),
        without="vit",
    )
    wanted = expected()
    assert_same(flatten(loaded), {path: leaf for path, leaf in wanted.items() if not path.startswith("vit/")})
    assert loaded["llama"]["layers"]["mlp"]["down_lora"]["a"].addressable_shards[0].data.shape == (2, 64, 3)


def test_a_whole_model_is_described_as_before(whole: Path) -> None:
    values = json.loads((whole / "model.json").read_text())
    assert values["format_version"] == 1 and "base" not in values
    assert read_manifest(whole).base is None and read_manifest(whole).trained == ()


def test_both_may_be_moved_together_but_not_one_alone(trained: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("run", "models"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    moved = tmp_path / "elsewhere" / "run" / "model"
    assert_same(flatten(checkpoint.load_params(moved)), expected())
    home = (tmp_path / "elsewhere" / "models" / "base").rename(tmp_path / "elsewhere" / "other")
    missing = tmp_path / "elsewhere" / "models" / "base"
    with pytest.raises(UserError, match=f"{moved}: its base {missing} is not there; put it back, or write where"):
        checkpoint.read_leaf(moved, "llama/norm/scale")
    assert read_manifest(moved).config == ADAPTED  # what it is can be told still
    values = json.loads((moved / "model.json").read_text())
    values["base"]["path"] = str(home)
    (moved / "model.json").write_text(json.dumps(values))
    assert_same(flatten(checkpoint.load_params(moved)), expected())


@pytest.mark.parametrize("change", ["alter", "cut", "remove chunk", "remove", "retype"])
def test_a_changed_base_is_refused_by_name(trained: Path, base: Path, change: str) -> None:
    """Whatever is read: also a parameter that is the same still."""
    leaf = base / "params" / "llama.layers.mlp.up.kernel"
    chunk = leaf / "c" / "1" / "0" / "0"
    if change == "alter":
        alter(base, "llama/layers/mlp/up/kernel")
    elif change == "cut":
        chunk.write_bytes(chunk.read_bytes()[:-40])
    elif change == "remove chunk":
        chunk.unlink()
    elif change == "remove":
        shutil.rmtree(leaf)
    else:
        text = (leaf / "zarr.json").read_text()
        (leaf / "zarr.json").write_text(text.replace('"bfloat16"', '"float16"'))
    for read in (checkpoint.load_params, lambda path: checkpoint.read_leaf(path, "llama/norm/scale")):
        with pytest.raises(UserError, match=f"{base}: .*llama/layers/mlp/up/kernel (has changed|is missing)"):
            read(trained)


def test_what_is_not_used_of_the_base_may_change(trained: Path, base: Path) -> None:
    alter(base, "projection/kernel")
    shutil.rmtree(base / "tokenizer")
    assert_same(flatten(checkpoint.load_params(trained)), expected())


def test_the_same_values_written_anew_are_the_same_base(trained: Path, base: Path) -> None:
    params = checkpoint.load_params(base)
    fields = {"config": MINIGPT4, "template": "vicuna_v1", "num_parameters": num_parameters(MINIGPT4)}
    with checkpoint.new_directory(base, overwrite=True) as partial:
        checkpoint.write_model(partial, params, fields)
    assert_same(flatten(checkpoint.load_params(trained)), expected())


def test_a_bit_that_flips_under_the_checksum_is_found_when_it_is_read(trained: Path, base: Path) -> None:
    chunk = base / "params" / "llama.layers.mlp.up.kernel" / "c" / "1" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(UserError, match=f"{base}: parameter llama/layers/mlp/up/kernel is missing or damaged"):
        checkpoint.load_params(trained)


def test_a_trained_parameter_that_is_lost_is_not_taken_from_the_base(trained: Path) -> None:
    shutil.rmtree(trained / "params" / "projection.kernel")
    with pytest.raises(UserError, match=f"{trained}: parameter projection/kernel is missing"):
        checkpoint.load_params(trained)


def test_training_on_a_trained_model_stands_on_the_same_base(trained: Path, base: Path, tmp_path: Path) -> None:
    """What the first run trained and the second did not is copied, so the first may be removed."""
    second, leaves = tmp_path / "second", as_leaves(ADAPTED, 2)
    new = {path: leaves[path] for path in (*PROJECTION, "llama/norm/scale")}
    write_trained_model(second, trained, new, ADAPTED, "vicuna_v1")
    shutil.rmtree(trained)
    assert_same(flatten(checkpoint.load_params(second)), expected() | new)
    manifest = read_manifest(second)
    assert manifest.base is not None and manifest.base.path == "../models/base"
    assert "llama/layers/attn/query_lora/a" in manifest.trained
    assert (second / "tokenizer").is_dir()
    alter(base, "llama/norm/scale")  # of which nothing is used any more
    assert_same(flatten(checkpoint.load_params(second)), expected() | new)


def test_an_earlier_one_is_replaced_and_nothing_else(trained: Path, base: Path, tmp_path: Path) -> None:
    leaves = as_leaves(MINIGPT4, 3)
    new = {path: leaves[path] for path in PROJECTION}
    write_trained_model(trained, base, new, MINIGPT4, "vicuna_v0")
    assert read_manifest(trained).config == MINIGPT4
    assert not list((trained / "params").glob("*_lora*"))
    assert np.array_equal(checkpoint.read_leaf(trained, "projection/bias"), new["projection/bias"])
    with pytest.raises(UserError, match="holds a whole model, which a trained one does not replace"):
        write_trained_model(base, base, new, MINIGPT4, "vicuna_v0")
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match="notes: is no earlier result"):
        write_trained_model(tmp_path / "notes", base, new, MINIGPT4, "vicuna_v0")


def test_a_write_that_fails_leaves_the_earlier_one(trained: Path, base: Path) -> None:
    class Failing(np.ndarray):
        def __getitem__(self, index: Any) -> Any:
            raise OSError("no space left")

    leaves = as_leaves(ADAPTED, 1)
    new = {path: leaf.view(Failing) if "_lora/" in path else leaf for path, leaf in leaves.items() if is_trained(path)}
    with pytest.raises(OSError, match="no space left"):
        write_trained_model(trained, base, new, ADAPTED, "vicuna_v1")
    assert_same(flatten(checkpoint.load_params(trained)), expected())
    assert [path.name for path in trained.parent.iterdir()] == ["model"]


def test_what_does_not_make_the_model_is_refused(base: Path, tmp_path: Path) -> None:
    leaves = as_leaves(ADAPTED, 1)
    new = {path: leaf for path, leaf in leaves.items() if is_trained(path)}
    for trained, config, message in [
        ({path: new[path] for path in PROJECTION}, ADAPTED, "differ in llama/layers/attn/query_lora/a"),
        (new, MINIGPT4, "query_lora/a was trained with shape .2, 64, 3., the model has None"),
        (new | {"projection/bias": np.zeros(63, np.float32)}, ADAPTED, r"shape \(63,\), the model has \(64,\)"),
        ({}, replace(MINIGPT4, vit=None), "differ in ln_vision/bias"),
    ]:
        with pytest.raises(UserError, match=message):
            write_trained_model(tmp_path / "out", base, trained, config, "vicuna_v0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [{"path": 1}, {"leaves": {"../x": "0"}}, {"more": 1}, "gone"])
def test_a_damaged_description_is_refused(trained: Path, damage: Any) -> None:
    values = json.loads((trained / "model.json").read_text())
    if damage == "gone":
        del values["base"]
    else:
        values["base"] |= damage
    (trained / "model.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"model.json: damaged"):
        checkpoint.load_params(trained)


TWO_PROCESSES = """
import sys
from pathlib import Path
import jax
port, index, base, out = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
from mgpt4_jax.checkpoint import flatten, write_trained_model
from mgpt4_jax.config import replace_fields
from mgpt4_jax.sharding import make_mesh, param_shardings
from tests.tiny import MINIGPT4, random_params
lora = {"rank": 3, "alpha": 6.0, "targets": ["query", "value", "down"]}
config = replace_fields(MINIGPT4, {"llama": {"lora": lora}})
shardings = flatten(param_shardings(config, make_mesh("fsdp=4")))
leaves = flatten(random_params(config, 1))
leaves = {path: leaf for path, leaf in leaves.items() if "_lora/" in path or path.startswith("projection/")}
placed = {
    path: jax.make_array_from_callback(leaf.shape, shardings[path], lambda index, leaf=leaf: leaf[index])
    for path, leaf in leaves.items()
}
assert not placed["projection/kernel"].is_fully_addressable
write_trained_model(Path(out) / index, base, placed, config, "vicuna_v1")
"""


def test_two_processes_write_it_once(base: Path, tmp_path: Path) -> None:
    """Each holds its own part of every parameter."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(port), str(index), base, tmp_path],
            env=environment(),
            cwd=Path(__file__).parent.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    errors = [program.communicate(timeout=120)[1] for program in programs]
    assert [program.returncode for program in programs] == [0, 0], errors
    assert not (tmp_path / "1").exists()
    assert_same(flatten(checkpoint.load_params(tmp_path / "0")), expected())


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}


# --- with real files and tokenisers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The recorded MiniGPT-4 with another projection and strong adapters, as a run writes it."""
    manifest, rng = read_manifest(model_dir), np.random.default_rng(0)
    config = replace(manifest.config, llama=replace(manifest.config.llama, lora=LORA))
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(config)).items()}
    new = {path: rng.normal(size=shape).astype(np.float32) * 0.3 for path, shape in shapes.items() if "_lora/" in path}
    new["projection/kernel"] = checkpoint.read_leaf(model_dir, "projection/kernel") * np.float32(1.5)
    out = tmp_path_factory.mktemp("adapted") / "model"
    write_trained_model(out, model_dir, new, config, manifest.template)
    return out


QUESTIONS = ["What is in the picture?", "Who?"]


def greedy_ids(model_dir: Path, images: list[Path]) -> list[list[int]]:  # noqa: F811
    """Of each question about each picture."""
    model = load(model_dir, slots=4, max_length=256)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "temperature": 0.0}
    prompts, shown = zip(*((question, image) for image in images for question in QUESTIONS), strict=True)
    return [answer.ids for answer in model.generate(prompts=prompts, images=shown, **options)]


def test_it_answers_as_a_model_whose_weights_were_merged(
    adapted: Path,
    model_dir: Path,  # noqa: F811
    pictures: list[Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """The merged one comes from Hugging Face's files: a language model with no trace of adapters."""
    export(adapted, format="hf", out=tmp_path / "hf")
    convert(from_dir=tmp_path / "hf", out=tmp_path / "merged", template="vicuna_v0")
    merged = read_manifest(tmp_path / "merged")
    assert merged.config.llama.lora is None and not any("_lora/" in path for path in merged.dtypes)
    read = merging(LORA, lambda path, layer: checkpoint.read_leaf(adapted, path, layer))
    for path in merged.dtypes:
        assert np.asarray(read(path, None)).shape == checkpoint.read_leaf(tmp_path / "merged", path).shape
        layer = 1 if checkpoint.is_stacked(path) else None
        found = checkpoint.read_leaf(tmp_path / "merged", path, layer)
        assert found.tobytes() == np.asarray(read(path, layer)).tobytes(), path
    answers = greedy_ids(adapted, pictures)
    assert answers == greedy_ids(tmp_path / "merged", pictures)
    plain = greedy_ids(model_dir, pictures)
    assert sum(one != other for one, other in zip(answers, plain, strict=True)) > len(answers) / 2


def test_the_language_model_in_memory_answers_alike(adapted: Path) -> None:
    """What training shows of its progress: an engine on the parameters of the run."""
    config, params = read_manifest(adapted).config, checkpoint.load_params(adapted)
    packed = [
        Engine(config, source, slots=1, max_length=64).params
        for source in (params, lambda path, layer: checkpoint.read_leaf(adapted, f"llama/{path}", layer))
    ]
    jax.tree.map(np.testing.assert_array_equal, *packed)


def test_the_command_line_serves_it(adapted: Path, pictures: list[Path], tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    def run(*arguments: object) -> str:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    assert "trained parameters are here, the others in its base" in run("inspect", adapted)
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 1, "image": str(pictures[0]), "prompt": "What is it?"}))
    run(
        "generate", adapted, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--max-new-tokens", 5
    )
    answer = json.loads((tmp_path / "out.jsonl").read_text())
    assert answer["finish_reason"] in ("length", "stop")
    run("export", adapted, "--format", "minigpt4", "--out", tmp_path / "trained.pth")
    run("export", adapted, "--format", "lavis", "--out", tmp_path / "lavis")
    saved = torch.load(tmp_path / "trained.pth", weights_only=True)["model"]
    assert saved.keys() == torch.load(tmp_path / "lavis" / "pretrained_minigpt4.pth", weights_only=True)["model"].keys()
    kernel = checkpoint.read_leaf(adapted, "projection/kernel")
    assert np.array_equal(saved["llama_proj.weight"].numpy(), kernel.T)
    key = "llama_model.base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    assert np.array_equal(saved[key].numpy(), checkpoint.read_leaf(adapted, "llama/layers/mlp/down_lora/a", 1).T)


def test_verify_compares_what_was_not_trained(adapted: Path) -> None:
    case = GOLDEN / "minigpt4_vicuna"
    files = {"vit": case / "eva_vit_g.pth", "qformer": case / "blip2_pretrained_flant5xxl.pth", "llm": case / "llm"}
    report = verify(adapted, **files, projection=case / "pretrained_minigpt4.pth")
    assert report.passed, report.failures
    assert set(report.skipped) == {
        "projection: trained since the conversion",
        "LoRA adapters: trained since the conversion",
    }
    names = {row.component for row in report.rows}
    assert "llama/layers/1" in names and "ln_vision" in names and "projection" not in names
