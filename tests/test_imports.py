"""Who may import whom: read from the sources, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import fnmatch
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"mgpt4_jax": ROOT / "mgpt4_jax", "mgpt4_jax.convert": ROOT / "convert"}

BASE = {"errors", "typing", "config"}
PIECES = BASE | {"models.masks", "models.layers", "models.lora"}
TOWERS = {"models.vit", "models.qformer", "models.llama", "models.opt", "models.t5"}
MODELS = {"models.encoder", "models.blip2", "models.blip2_lm", "models.minigpt4"}
ANY_MODEL = {"models", "models.masks", "models.layers", "models.lora"} | TOWERS | MODELS
STORES = BASE | ANY_MODEL | {"progress", "memory", "sharding", "checkpoint", "data"}
LIBRARY = STORES | {"losses", "optim", "fingerprint", "train_config", "distributed"}
USES = {"train", "generate", "evaluate", "evaluate.perplexity", "search", "serve", "curate"}
# A room may import itself and these. The longest name that fits a module is its room.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "typing": set(),
    "config": {"errors"},
    "progress": {"errors"},
    "distributed": {"errors"},
    "memory": set(),
    "train_config": {"errors", "config"},
    "models.masks": BASE,
    "models.layers": BASE | {"models.masks"},
    "models.lora": BASE | {"models.masks", "models.layers"},
    **dict.fromkeys(TOWERS, PIECES),
    **dict.fromkeys(MODELS, PIECES | TOWERS | {"models.encoder"}),
    "models": BASE | ANY_MODEL,
    "losses": BASE,
    "optim": BASE | {"train_config"},
    "sharding": BASE | ANY_MODEL,
    "checkpoint": BASE | ANY_MODEL | {"sharding"},
    "fingerprint": BASE | ANY_MODEL | {"sharding", "checkpoint"},
    "initial": BASE | ANY_MODEL | {"checkpoint", "data"},
    "data": {"errors", "config", "train_config"},
    "train": LIBRARY,
    "generate": STORES,
    **dict.fromkeys(USES - {"train", "generate"}, STORES | {"generate"}),
    "evaluate.perplexity": LIBRARY | {"train", "generate", "evaluate"},  # which measures rows as they are trained
    "search": STORES | {"generate", "fingerprint"},  # which names the model of an index
    "convert": STORES | {"losses"},
    "api": LIBRARY | USES | {"convert"},
    "commands": LIBRARY | USES | {"", "convert", "api", "initial"},
    "cli": {"errors", "commands"},
    "demo": {"errors", "cli", "demo_page", "demo_questions", "tiny", "tiny_report"},
    "demo_page": {"errors", "data"},
    "demo_questions": {"errors", "data", "evaluate", "train", "demo_page"},
    "tiny": {"errors", "data", "tiny_report"},
    "tiny_report": {"errors"},
    "__main__": {"cli"},
    "": {"api"},  # mgpt4_jax/__init__.py
}
# Packages that only these files may name, as patterns of paths from the root.
ONLY_IN = {
    # the readers and writers of its files, and the PyTorch side of `mgpt4 verify`
    "torch": [
        "convert/readers.py",
        "convert/export.py",
        "convert/reference.py",
        "convert/comparison.py",
        "convert/verify*",
    ],
    "transformers": ["mgpt4_jax/data/text.py", "convert/reference.py"],
    "tensorflow": [],
    "tensorflow_datasets": ["mgpt4_jax/data/records.py"],
    "torchvision": [],
    "faiss": ["mgpt4_jax/search/vectors.py"],
}


def modules() -> dict[str, Path]:
    """Every module of the installed package, by its installed name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Full names that a module imports; ``from package import name`` names the module when it is one."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            whole = {f"{source}.{alias.name}" for alias in node.names}
            yield from (whole & MODULES.keys()) or {source}


def room(name: str) -> str:
    inner = name.removeprefix("mgpt4_jax").removeprefix(".")
    fits = [key for key in MAY_IMPORT if key and (inner == key or inner.startswith(f"{key}."))]
    found = max(fits, key=len, default="")
    new = inner != found if found in {"", "models"} else False  # each file of models/ has its own line
    assert not new, f"{name} has no line in MAY_IMPORT: say what it may import"
    return found


def is_ours(name: str) -> bool:
    return name == "mgpt4_jax" or name.startswith("mgpt4_jax.")


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_what_its_room_may(name: str) -> None:
    here = room(name)
    rooms = {room(target): target for target in imports(name) if is_ours(target)}
    wrong = {target for other, target in rooms.items() if other != here and other not in MAY_IMPORT[here]}
    assert not wrong, f"{name} may not import {sorted(wrong)}"


def test_the_rooms_form_no_circle() -> None:
    free: set[str] = set()
    entries = {"cli", "demo"}  # two programs of one command line; nothing stands on them
    while ready := {key for key in MAY_IMPORT.keys() - free if MAY_IMPORT[key] - entries - {key} <= free}:
        free |= ready
    assert free == MAY_IMPORT.keys()


@pytest.mark.parametrize("package", ONLY_IN)
def test_heavy_packages_stay_in_their_files(package: str) -> None:
    users = {
        str(MODULES[name].relative_to(ROOT))
        for name in MODULES
        if any(target.split(".")[0] == package for target in imports(name))
    }
    wrong = {user for user in users if not any(fnmatch.fnmatch(user, pattern) for pattern in ONLY_IN[package])}
    assert not wrong, f"{package} is imported by {sorted(wrong)}"


def test_data_reaches_no_jax() -> None:
    """Also through what it imports: a data worker starts without an accelerator."""
    reached = {name for name in MODULES if room(name) == "data"}
    queue = list(reached)
    while queue:
        for target in imports(queue.pop()):
            assert target.split(".")[0] not in {"jax", "jaxlib", "flax", "optax", "orbax"}
            if target in MODULES and target not in reached:
                reached.add(target)
                queue.append(target)


def test_importing_the_library_is_light() -> None:
    """Without PyTorch, TensorFlow or tokenisers, and with every connection refused."""
    program = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("the import opened a connection")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import mgpt4_jax
print(sorted({"torch", "tensorflow", "transformers"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
