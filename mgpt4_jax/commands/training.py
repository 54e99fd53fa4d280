"""``mgpt4 train``: one run of a stage."""

from __future__ import annotations

import dataclasses

from jsonargparse import ArgumentParser, Namespace

from mgpt4_jax.commands import Commands


def _add_train(parser: ArgumentParser) -> None:
    from mgpt4_jax.distributed import add_options
    from mgpt4_jax.train_config import TrainConfig

    parser.add_argument("--config", action="config", help="a YAML file of configs/; options after it change its values")
    parser.add_class_arguments(TrainConfig, as_group=False)
    parser.add_argument("--resume-from", type=int, metavar="STEP", help="go on from this checkpoint, not the newest")
    add_options(parser)


def _train(arguments: Namespace) -> int:
    from mgpt4_jax.config import LoraConfig
    from mgpt4_jax.distributed import ending_together, initialize, options_from
    from mgpt4_jax.train_config import TrainConfig

    options, resume_from = options_from(arguments), arguments.resume_from
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, "train")
    fields = {field.name: arguments[field.name] for field in dataclasses.fields(TrainConfig)}
    if fields["lora"] is not None:  # what is wrong with it, which `LoraConfig | None` would wrap in its own words
        LoraConfig(**vars(fields["lora"]))
    config = parser.instantiate(Namespace(train=Namespace(**fields))).train
    initialize(options)
    with ending_together():
        from mgpt4_jax.train.loop import train

        outcome = train(config, resume_from=resume_from)
    return 0 if outcome.signal is None else 128 + outcome.signal


COMMANDS: Commands = {
    "train": (
        _train,
        _add_train,
        "Train a stage of a model, or go on with a run that stopped.",
        "mgpt4 train --config configs/minigpt4_stage1_7b.yaml --model models/minigpt4-7b --run runs/stage1",
    ),
}
