"""The parameters of a training: the one table that describes each of them.

Flags and their help, checks, studies' settings, names of runs, progress, tables and reports read
`PARAMETERS`. Any of them can be searched. To add one, add a field to `TrainConfig`, and a row here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from cnn.references import did_you_mean, is_reference
from experiments.study.domains import Domain, Range, split_words
from experiments.study.parameter_types import (
    ChoiceParameter,
    Configuration,
    LogRangeParameter,
    Parameter,
)

# In this order they are suggested: a parameter may depend on those above it.
PARAMETERS: tuple[Parameter, ...] = (
    ChoiceParameter(
        name="loss",
        help="loss functions, or all; they are listed below; or package.module:loss, file.py:loss",
        metavar="LOSS",
        plural="losses",
        default=("l1", "mse", "cross_entropy"),
        all_of="cnn.losses:LOSSES",
    ),
    LogRangeParameter(
        name="learning_rate",
        short="lr",
        form=".3g",
        help="peak learning rates",
        metavar="RATE",
        default=Range(0.001, 1.0, log=True),
    ),
    ChoiceParameter(
        name="batch_size",
        short="bs",
        form=".0f",  # of a column with a missing value, pandas makes floats
        help="batch sizes, in images a step",
        metavar="IMAGES",
        plural="batch_sizes",
        default=(16, 32, 64, 128),
        kind=int,
    ),
    Parameter(
        name="network",
        help="the network: cnn, cnn_relu, resnet (ResNet-20), torchvision:MODEL, "
        "package.module:factory or file.py:factory; a factory takes num_classes, and image_size if "
        "it needs it",
        default="cnn",
    ),
    Parameter(
        name="optimizer",
        help="sgd has Nesterov momentum",
        choices=("sgd", "adam", "adamw"),
        default="sgd",
    ),
    Parameter(
        name="momentum",
        short="m",
        form=".3g",
        kind=float,
        metavar="SHARE",
        help="of sgd",
        default=0.9,
        applies=lambda values: values.get("optimizer", "sgd") == "sgd",
    ),
    Parameter(
        name="weight_decay",
        short="wd",
        form=".2g",
        kind=float,
        metavar="RATE",
        help="as the optimizer defines it",
        default=0.0,
    ),
    Parameter(
        name="schedule",
        help="how the learning rate changes during a trial",
        choices=("one_cycle", "cosine", "constant"),
        default="one_cycle",
    ),
    Parameter(
        name="warmup",
        short="warmup",
        form=".2g",
        kind=float,
        metavar="SHARE",
        help="share of the steps in which the learning rate rises (default: 0.3 for one_cycle, "
        "else 0)",
    ),
    Parameter(
        name="label_smoothing",
        short="ls",
        form=".2g",
        kind=float,
        metavar="SHARE",
        help="share of each label that is spread over all classes",
        default=0.0,
    ),
    Parameter(
        name="augment",
        help="random changes of the training images: mirrored; and shifted by up to an eighth",
        choices=("none", "flip", "flip_crop"),
        default="none",
    ),
    Parameter(
        name="precision",
        help="of the network's arithmetic; auto is bfloat16 where the processor is fast at it",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
    ),
)

BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}


def parse_vary(texts: Sequence[str], options: argparse.Namespace) -> dict[str, Domain]:
    """Return the domains that `--vary` gives, by names of parameters.

    Raises:
        ValueError: there is no such parameter, or it is given twice, or by its own flag as well.
    """
    domains: dict[str, Domain] = {}
    for text in texts:
        name, sign, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not sign:
            raise ValueError(f"--vary takes NAME=LOW..HIGH[:log] or NAME=A,B,C, not {text!r}")
        if name not in BY_NAME:
            hint = did_you_mean(name, BY_NAME)
            raise ValueError(
                f"--vary: there is no parameter {name!r}{hint}: choose one of {', '.join(BY_NAME)}"
            )
        if name in domains:
            raise ValueError(f"--vary {name} is given twice")
        if BY_NAME[name].is_given(options):
            raise ValueError(
                f"{name} is given by --vary and by {BY_NAME[name].flag}: give one of them"
            )
        domains[name] = BY_NAME[name].parse_domain(values)
    return domains


def networks(options: argparse.Namespace) -> list[str]:
    """Return the networks of a command line."""
    varied = parse_vary(options.vary, options).get("network")
    return [*varied.values] if varied else [options.network]


def references(options: argparse.Namespace) -> list[str]:
    """Return the references to a user's own networks and losses on a command line."""
    varied = parse_vary(options.vary, options).get("loss")
    losses = varied.values if varied else split_words(options.losses)
    values = [*networks(options), *losses]
    # torchvision:resnet18 has the same form.
    return [each for each in values if is_reference(each) and not each.startswith("torchvision:")]


def searched(settings: Mapping[str, Any]) -> dict[str, Domain]:
    """Return what is searched by a study with these settings, by names of parameters."""
    domains = {each.name: each.from_settings(settings) for each in PARAMETERS}
    return {name: domain for name, domain in domains.items() if domain is not None}


def run_name(number: int, values: Configuration) -> str:
    """Return the name of a trial's run, such as `012 mse lr=0.0312 bs=64`."""
    parts = [f"{number:03d}"]
    for parameter in PARAMETERS:
        if parameter.name in values:
            text = parameter.text(values[parameter.name])
            parts.append(f"{parameter.short}={text}" if parameter.short else text)
    if "seed" in values:
        parts.append(f"seed={values['seed']}")
    return " ".join(parts)
