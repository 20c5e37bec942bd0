"""The length of an epoch in steps, by which num_train_epochs and the strategies 'epoch' count."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from fractions import Fraction

from llm_local.checkpoint.line import documents_begin
from llm_local.config import Config, ConfigError
from llm_local.data.mixture import training_sources
from llm_local.data.sets import prepare, tokenizer_of
from llm_local.problems import data_flag_problems
from llm_local.replicas import replicas_of, sequences_per_step


def with_epochs(config: Config, world_size: int) -> Config:
    """The config with the rows of an epoch and of a step, and the steps of num_train_epochs; as it is, where no flag
    speaks of epochs.

    Prepares the data. Raises ConfigError for what is wrong with it, and where its rows cannot be counted.
    """
    flag = config.epoch_flag
    if flag is None:
        return config
    train = config.train
    if problems := data_flag_problems(config):
        raise ConfigError(problems)
    sources = training_sources(config)
    if len(sources) > 1 or sources[0].streaming:
        instead = "max_steps" if flag == "num_train_epochs" else flag.replace("strategy", "steps")
        what = "a stream" if len(sources) == 1 else "a mixture"
        given = f"{flag}={getattr(train, flag)}"
        raise ConfigError([f"{given} counts the rows of the data, which {what} does not tell; use {instead}"])
    config = replace(config, data=replace(config.data, add_bos=documents_begin(config)))
    rows, _ = prepare(config, tokenizer_of(config), progress=sys.stderr.isatty())
    assert rows.num_sequences is not None
    of_step = sequences_per_step(config, replicas_of(config, world_size))
    steps = train.max_steps
    if train.num_train_epochs is not None and steps < 0:
        epochs = Fraction(train.num_train_epochs).limit_denominator(10**6)
        steps = math.ceil(epochs * Fraction(rows.num_sequences, of_step))
    return replace(config, epoch=(rows.num_sequences, of_step), train=replace(train, max_steps=steps))
