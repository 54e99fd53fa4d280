"""Only the mapping of top-level folders into the one installed package; all metadata is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {"mgpt4_jax.convert": "convert", "mgpt4_jax.configs": "configs", "mgpt4_jax.launch": "launch"}


def packages() -> list[str]:
    """Everything that is installed: nothing outside ``mgpt4_jax``, so neither tests nor benchmarks."""
    inside = find_packages(include=["mgpt4_jax", "mgpt4_jax.*"])
    below = [f"{name}.{package}" for name, folder in FOLDERS.items() for package in find_packages(folder)]
    return [*inside, *FOLDERS, *below]


if __name__ == "__main__":
    setup(
        packages=packages(),
        package_dir=FOLDERS,
        package_data={"mgpt4_jax": ["py.typed"], "mgpt4_jax.configs": ["*.yaml"], "mgpt4_jax.launch": ["*.sh"]},
    )
