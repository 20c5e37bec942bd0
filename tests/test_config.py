"""Flags, YAML and defaults become one Config; all that is wrong with it is said at once, with the repair."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from llm_local.config import Config, ConfigError, from_flat, is_due, parse
from llm_local.flags import FLAGS, NOT_NEGATIVE, POSITIVE, RATE, SECTIONS, SHARE, SOME_STEPS, STEPS
from llm_local.methods.final_steps import GlobalSchedule
from llm_local.problems import parse_stage_layers, static_problems


@pytest.fixture
def write(tmp_path):
    """write(text) → the name of a YAML file that holds it."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def refusal(arguments: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse(arguments)
    return error.value.problems


class TestParse:
    def test_nothing_gives_the_defaults(self, write):
        assert parse([]) == Config()
        assert parse([write("")]) == Config()

    def test_flags(self):
        config = parse(["--config_name", "m.json", "--num_stages", "2", "--learning_rate=3e-4", "--bf16"])
        assert config.model.config_name == "m.json"
        assert config.local.num_stages == 2
        assert config.train.learning_rate == 3e-4
        assert config.train.bf16 is True

    def test_a_flag_wins_over_the_file_and_the_file_over_the_default(self, write):
        config = parse([write("max_steps: 20\nseed: 7\nbf16: true\n"), "--max_steps", "30", "--bf16", "false"])
        assert (config.train.max_steps, config.train.seed, config.train.bf16) == (30, 7, False)
        assert config.train.eval_batches == Config().train.eval_batches

    def test_flag_names_are_unique_across_the_sections(self):
        names = [field.name for section in SECTIONS for field in dataclasses.fields(section)]
        assert len(names) == len(set(names))
        assert list(Config().flat()) == names

    @pytest.mark.parametrize("launcher", [["--local_rank=3"], ["--local_rank=0"]])
    def test_the_launchers_rank_may_stand_before_the_file(self, write, launcher):
        assert parse([*launcher, write("seed: 7"), "--max_steps", "3"]).train.seed == 7

    def test_the_launchers_rank_as_two_words(self):
        assert parse(["--local_rank", "1", "--seed", "7"]).train.seed == 7

    def test_help_shows_every_flag(self, capsys):
        with pytest.raises(SystemExit) as stop:
            parse(["--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert all(f"--{name}" in shown for name in Config().flat())

    @pytest.mark.parametrize(
        ("line", "value"),
        [
            ("learning_rate: 3e-4", 3e-4),
            ("learning_rate: 1", 1.0),
            ("learning_rate: '0.5'", 0.5),
            ("max_steps: 12", 12),
            ("max_steps: 12.0", 12),
            ("max_steps: '12'", 12),
            ("max_steps: 1_000", 1000),
            ("save_steps: 20", 20),
            ("save_steps: '0.25'", 0.25),
            ("warmup_steps: 3.0", 3),
            ("streaming: yes", True),
            ("streaming: false", False),
            ("stage_layers: 4", "4"),
            ("stage_layers: 4,4", "4,4"),
            ("resume_from_checkpoint: true", "true"),
            ("sample_prompt: 'yes'", "yes"),
            ("layers_per_block: null", None),
            ("train_file:", None),
        ],
    )
    def test_yaml_types(self, write, line, value):
        got = parse([write(line)]).flat()[line.split(":")[0]]
        assert got == value
        assert type(got) is type(value)

    @pytest.mark.parametrize(
        ("line", "what"),
        [
            ("max_steps: 12.5", "12.5 is not a whole number"),
            ("max_steps: many", "'many' is not a whole number"),
            ("max_steps: true", "True is not a whole number"),
            ("max_steps: .inf", "inf is not a whole number"),
            ("max_steps: [1]", "[1] is not a whole number"),
            ("max_steps: null", "None is not a value"),
            ("learning_rate: fast", "'fast' is not a number"),
            ("learning_rate: .nan", "nan is not a number"),
            ("learning_rate: false", "False is not a number"),
            ("save_steps: often", "'often' is not a number"),
            ("bf16: 1", "1 is not true or false"),
            ("bf16: null", "None is not a value"),
        ],
    )
    def test_a_value_of_another_type(self, write, line, what):
        path = write(line)
        assert refusal([path]) == [f"{path}: {line.split(':')[0]}: {what}"]

    def test_all_problems_of_a_file_at_once(self, write):
        path = write("max_step: 3\nmax_steps: x\n7: 8\n")
        assert refusal([path]) == [
            f"{path}: unknown setting 'max_step'; see pretrain.py --help",
            f"{path}: max_steps: 'x' is not a whole number",
            f"{path}: unknown setting 7; see pretrain.py --help",
        ]

    def test_a_file_that_is_not_there(self, tmp_path):
        path = tmp_path / "none.yaml"
        assert refusal([str(path)]) == [f"cannot read the configuration file {path}: No such file or directory"]

    @pytest.mark.parametrize("text", ["a: b: c", "a: [", b"a: \xff"])
    def test_a_file_that_is_not_yaml(self, write, text):
        path = write(text)
        (problem,) = refusal([path])
        assert problem.startswith(f"{path} is not YAML: ")
        assert "\n" not in problem

    @pytest.mark.parametrize(("text", "kind"), [("- a", "list"), ("seed", "str"), ("3", "int")])
    def test_a_file_without_names(self, write, text, kind):
        path = write(text)
        assert refusal([path]) == [f"{path} holds {kind}, not 'name: value' lines"]

    def test_unknown_flags(self):
        assert refusal(["--max_step", "3"]) == [  # no abbreviations: max_step could as well be a slip
            "unknown argument '--max_step'; see pretrain.py --help",
        ]
        found = refusal(["--max_step", "3", "--sead=1", "two"])
        assert [line.split(";")[0] for line in found] == [  # a flag and its value are one problem
            "unknown argument '--max_step'",
            "unknown argument '--sead=1'",
            "unknown argument 'two'",
        ]

    def test_a_flag_of_another_program_is_answered_with_ours(self):
        assert refusal(["--block_size", "3"]) == ["unknown argument '--block_size'; use --seq_length"]

    @pytest.mark.parametrize(
        ("arguments", "what"),
        [
            (["--seed", "x"], "invalid int value: 'x'"),
            (["--seed"], "expected one argument"),
            (["--learning_rate", "x"], "invalid float value: 'x'"),
            (["--bf16", "maybe"], "got maybe"),
        ],
    )
    def test_a_flag_of_another_type_is_an_error_and_no_exit(self, arguments, what):
        (problem,) = refusal(arguments)
        assert arguments[0] in problem
        assert what in problem
        assert "see pretrain.py --help" in problem

    def test_the_error_counts_and_lists(self):
        assert str(ConfigError(["a is bad"])) == "the configuration has 1 problem:\n  - a is bad"
        assert str(ConfigError(["a", "b", "a"])) == "the configuration has 2 problems:\n  - a\n  - b"


CHANGES = {
    "config_name": "m.json",
    "train_file": "t.txt",
    "stage_layers": "1,2",
    "adam_epsilon": 1e-12,
    "sample_prompt": "true: #1\n",
    "bf16": True,
    "save_total_limit": 2,
}


class TestRunConfig:
    def test_from_flat_inverts_flat(self):
        config = from_flat(CHANGES)
        assert config != Config()
        assert from_flat(config.flat()) == config

    def test_the_resolved_configuration_is_a_configuration_file(self, write):
        config = from_flat(CHANGES)
        assert parse([write(yaml.safe_dump(config.flat(), sort_keys=False))]) == config

    def test_from_flat_names_every_unknown_setting(self):
        with pytest.raises(ConfigError) as error:
            from_flat({"seed": 1, "sead": 2, "max_step": 3})
        assert error.value.problems == [
            "unknown setting 'max_step'; see pretrain.py --help",
            "unknown setting 'sead'; see pretrain.py --help",
        ]

    @pytest.mark.parametrize(
        ("arguments", "steps"),
        [
            ("", 0),
            ("--warmup_steps 7", 7),
            ("--warmup_steps 0.25", 11),
            ("--warmup_ratio 0.25", 11),
            ("--warmup_ratio 0.25 --warmup_steps 7", 7),
        ],
    )
    def test_steps_of_warm_up(self, arguments, steps):
        config = parse(["--max_steps", "42", *arguments.split()])
        assert config.warmup_steps == steps
        assert type(config.warmup_steps) is int

    @pytest.mark.parametrize(
        ("arguments", "logging", "evaluation", "saves"),
        [
            ("", 10, 0, 0),
            ("--logging_steps 3 --eval_steps 5 --save_steps 7", 3, 5, 7),
            ("--logging_steps 0.1 --eval_steps 0.25 --save_steps 0.5", 5, 11, 21),
            ("--logging_strategy no --eval_strategy no --save_strategy no --eval_steps 5 --save_steps 7", 0, 0, 0),
            ("--logging_strategy steps --eval_strategy steps --save_strategy steps --logging_steps 3", 3, 3, 500),
            ("--eval_strategy steps --save_strategy steps --eval_steps 5 --save_steps 7", 10, 5, 7),
        ],
    )
    def test_when_a_run_records_evaluates_and_saves(self, arguments, logging, evaluation, saves):
        config = parse(["--max_steps", "42", *arguments.split()])
        assert (config.logging_interval, config.eval_interval, config.save_interval) == (logging, evaluation, saves)

    def test_steps_that_are_said_win_over_epochs_and_both_over_the_file(self, write):
        path = write("max_steps: 20\n")
        both = ["--num_train_epochs", "3", "--max_steps", "7"]
        assert parse(["--num_train_epochs", "3"]).epoch_flag == "num_train_epochs"
        assert parse([path, "--num_train_epochs", "3"]).epoch_flag == "num_train_epochs"
        assert parse([write("num_train_epochs: 3\n")]).epoch_flag == "num_train_epochs"
        for arguments in (both, [path, *both], [write("num_train_epochs: 3\nmax_steps: 7\n")]):
            config = parse(arguments)
            assert (config.epoch_flag, config.train.max_steps) == (None, 7)

    @pytest.mark.parametrize("name", ["logging", "eval", "save"])
    def test_an_epoch_ends_in_the_step_that_reads_its_last_row(self, name):
        config = parse(["--max_steps", "42", f"--{name}_strategy", "epoch"])
        assert config.epoch_flag == f"{name}_strategy"
        interval = getattr(replace(config, epoch=(52, 5)), f"{name}_interval")
        assert [step for step in range(1, 55) if is_due(step, interval)] == [11, 21, 32, 42, 52]

    @pytest.mark.parametrize("flag", ["bf16", "fp16", "neither"])
    def test_the_wire_has_the_models_precision_unless_told(self, flag):
        config = from_flat({flag: True} if flag != "neither" else {})
        assert config.precision == (flag if flag != "neither" else "fp32")
        assert config.wire_dtype == config.precision
        assert from_flat({**config.flat(), "wire_dtype": "fp16"}).wire_dtype == "fp16"

    @pytest.mark.parametrize(
        ("changes", "layers", "stride"),
        [
            ({}, None, None),
            ({"layers_per_block": 3}, 3, None),
            ({"method": "greedy"}, 1, None),
            ({"method": "backprop"}, None, None),
            ({"method": "overlapping"}, 2, 1),
            ({"method": "overlapping", "layers_per_block": 3}, 3, 2),
            ({"method": "overlapping", "layers_per_block": 4, "block_stride": 3}, 4, 3),
        ],
    )
    def test_blocks_and_windows_of_a_method(self, changes, layers, stride):
        config = from_flat(changes)
        method, local = config.method, config.local
        assert (method.block_layers(local), method.window_stride(local)) == (layers, stride)

    def test_the_last_steps_are_global(self):
        config = from_flat({"max_steps": 10, "final_backprop_steps": 3})
        kinds = [config.method.schedule_at(config.local, 10, step) for step in range(1, 11)]
        assert [step for step, kind in enumerate(kinds, 1) if kind is GlobalSchedule] == [8, 9, 10]
        assert config.method.schedule_at(from_flat({}).local, 10, 10) is not GlobalSchedule

    def test_only_backprop_over_several_stages_is_deepspeeds_pipeline(self):
        assert from_flat({"method": "backprop", "num_stages": 2}).is_pipelined
        assert not from_flat({"method": "backprop"}).is_pipelined
        assert not from_flat({"num_stages": 2}).is_pipelined

    @pytest.mark.parametrize(
        ("changes", "schedule"),
        [
            ({}, (0,)),
            ({"head_layers": 2}, (2,)),
            ({"head_layers_schedule": "2, 1,0"}, (2, 1, 0)),
            ({"head_layers_schedule": "x"}, (0,)),
            ({"head_layers_schedule": "2,1", "method": "backprop"}, (0,)),
        ],
    )
    def test_private_layers_by_block(self, changes, schedule):
        assert from_flat(changes).head_layers_schedule == schedule

    def test_folders(self, monkeypatch):
        assert from_flat({"output_dir": "a/b"}).output_dir == Path("a/b")
        assert from_flat({"cache_dir": "c"}).cache_dir == Path("c")
        monkeypatch.setenv("XDG_CACHE_HOME", "x")
        assert Config().cache_dir == Path("x/llm_local")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert Config().cache_dir == Path.home() / ".cache/llm_local"


def problems_of(fp16_supported: bool = True, bf16_supported: bool = True, **changes) -> list[str]:
    """The problems on four ranks of a configuration that has none but for `changes`."""
    return static_problems(from_flat({"config_name": "m.json", **changes}), 4, fp16_supported, bf16_supported)


class TestStaticProblems:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"num_stages": 4, "stage_layers": "1, 2,3,4"},
            {"num_stages": 2, "method": "greedy", "layers_per_block": 1, "bf16": True},
            {"num_stages": 2, "method": "backprop", "fp16": True},
            {"num_stages": 1, "method": "backprop"},
            {"num_stages": 2, "method": "overlapping"},
            {"method": "overlapping", "layers_per_block": 3},
            {"method": "overlapping", "layers_per_block": 3, "block_stride": 2},
            {"method": "overlapping", "layers_per_block": 4, "block_stride": 2},
            {"final_backprop_steps": 10, "max_steps": 10},
            {"head": "decoder", "head_layers_schedule": "0, 2,1", "head_rank": 4, "head_token_fraction": 0.25},
            {"block_loss_weights": "0.5, 0", "head_features": True},
            {"method": "backprop", "head": "decoder", "head_layers": 1},
            {"num_stages": 2, "layers_per_block": 3},
            {"config_name": None, "model_name_or_path": "m"},
            {"train_file": "t.txt", "validation_file": "v.txt"},
            {"load_best_model_at_end": True, "save_steps": 4, "eval_steps": 2, "greater_is_better": False},
            {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"},
            {"max_grad_norm": 0, "eval_batches": 0, "adam_beta1": 0, "warmup_steps": 0},
        ],
    )
    def test_none(self, changes):
        assert problems_of(**changes) == []

    @pytest.mark.parametrize(
        ("changes", "line"),
        [
            ({"method": "x"}, "method='x' is unknown; choose one of backprop, chunked, delayed, greedy, overlapping"),
            ({"head": "x"}, "head='x' is unknown; choose one of decoder, linear, shared"),
            ({"wire_dtype": "x"}, "wire_dtype='x' is unknown; choose one of auto, fp32, bf16, fp16, int8, int4"),
            (
                {"lr_scheduler_type": "x"},
                "lr_scheduler_type='x' is unknown; choose one of linear, cosine, constant, constant_with_warmup, "
                "polynomial, inverse_sqrt",
            ),
            ({"head": "decoder"}, "head=decoder needs private layers; set head_layers=1 or more, or use head=linear"),
            ({"head_layers": 2}, "head=linear has no private layers, head_layers is 2; use head=decoder"),
            (
                {"head": "decoder", "head_layers_schedule": "2,x"},
                "head_layers_schedule='2,x' is not a list of whole numbers such as 2,1,1",
            ),
            (
                {"head": "decoder", "head_layers_schedule": "2,-1"},
                "head_layers_schedule='2,-1' is not a list of whole numbers such as 2,1,1",
            ),
            (
                {"head": "decoder", "head_layers": 1, "head_layers_schedule": "2,1"},
                "both head_layers=1 and head_layers_schedule='2,1' are given; keep one",
            ),
            (
                {"head_layers_schedule": "2,1"},
                "head=linear has no private layers, head_layers_schedule='2,1' is given; use head=decoder",
            ),
            (
                {"head": "decoder", "head_layers_schedule": "0,0"},
                "head=decoder needs private layers, head_layers_schedule='0,0' has none; use 1 or more, or head=linear",
            ),
            ({"head_token_fraction": 0.0}, "head_token_fraction=0.0 must lie in (0, 1]"),
            ({"head_token_fraction": 1.1}, "head_token_fraction=1.1 must lie in (0, 1]"),
            (
                {"head_rank": 4},
                "head_rank=4 is for the private layers of a head, head=linear has none; use head=decoder with "
                "head_layers, or leave it out",
            ),
            ({"block_loss_weights": "1;2"}, "block_loss_weights='1;2' is not a list of numbers such as 0.5,1"),
            ({"block_loss_weights": "1,nan"}, "block_loss_weights='1,nan' is not a list of numbers such as 0.5,1"),
            ({"block_loss_weights": "1,-2"}, "block_loss_weights='1,-2' has the negative weight -2; use 0 or more"),
            (
                {"block_loss_weights": "0,0"},
                "block_loss_weights='0,0' trains nothing; give at least one weight above 0",
            ),
            (
                {"method": "backprop", "head_token_fraction": 0.5, "block_loss_weights": "2", "head_features": True},
                "method=backprop has one head, the model's own; leave out head_token_fraction, head_features, "
                "block_loss_weights",
            ),
            ({"dataset_name": "d", "train_file": "t"}, "both dataset_name and train_file are given; keep one"),
            ({"validation_file": "v"}, "validation_file needs train_file"),
            (
                {"max_train_samples": 5, "streaming": True},
                "max_train_samples=5 does not work with streaming; use max_steps",
            ),
            (
                {"max_train_samples": 5, "data_mixture": "m"},
                "max_train_samples=5 does not work with data_mixture; use max_steps",
            ),
            ({"greater_is_better": True}, "greater_is_better=True: the lowest loss is the best; leave it out"),
            *(
                (
                    {"load_best_model_at_end": True, **flags},
                    "load_best_model_at_end=True needs an evaluation of each checkpoint; give save_steps, and "
                    "eval_steps of which it is a multiple",
                )
                for flags in (
                    {},
                    {"save_steps": 4},
                    {"save_steps": 4, "eval_steps": 3},
                    {"save_steps": 4, "eval_steps": 2, "eval_batches": 0},
                    {"save_strategy": "epoch", "eval_steps": 3},
                )
            ),
            ({"metric_for_best_model": "f1"}, "metric_for_best_model='f1' is unknown; choose one of loss, eval_loss"),
            ({"num_train_epochs": 3}, "num_train_epochs=3 is counted by a run alone; use max_steps"),
            (
                {"eval_strategy": "epochs"},
                "eval_strategy='epochs' is unknown; choose one of no, steps, epoch",
            ),
            ({"model_name_or_path": "m"}, "both model_name_or_path and config_name are given; keep one"),
            ({"model_type": "llama"}, "both config_name and model_type are given; keep one"),
            (
                {"config_name": None},
                "no model: give config_name or model_type (a new model) or model_name_or_path (a pretrained one)",
            ),
            ({"adam_beta1": 1}, "adam_beta1=1 must lie in [0, 1)"),
            ({"adam_beta2": -0.1}, "adam_beta2=-0.1 must lie in [0, 1)"),
            ({"seq_length": 1}, "seq_length=1 leaves nothing to predict; use 2 or more"),
            ({"validation_split_percentage": 0}, "validation_split_percentage=0 must lie between 1 and 99"),
            ({"validation_split_percentage": 100}, "validation_split_percentage=100 must lie between 1 and 99"),
            (
                {"num_stages": 3},
                "4 ranks cannot be divided into num_stages=3 stages of equal size; start a multiple of 3 ranks, "
                "change num_stages, or give stage_replicas",
            ),
            (
                {"num_stages": 8},
                "4 ranks cannot be divided into num_stages=8 stages of equal size; start a multiple of 8 ranks, "
                "change num_stages, or give stage_replicas",
            ),
            ({"stage_layers": "4;4"}, "stage_layers='4;4' is not a list such as 4,4"),
            ({"stage_layers": "4,-4"}, "stage_layers='4,-4' is not a list such as 4,4"),
            ({"num_stages": 2, "stage_layers": "4"}, "stage_layers='4' names 1 stages, num_stages is 2"),
            ({"num_stages": 2, "stage_layers": "4,0"}, "stage_layers='4,0' leaves stage 1 without a layer"),
            (
                {"method": "greedy", "layers_per_block": 2},
                "layers_per_block=2 is for method=chunked, delayed, overlapping, not greedy",
            ),
            (
                {"method": "backprop", "num_stages": 2, "layers_per_block": 2},
                "layers_per_block=2 is for method=chunked, delayed, overlapping, not backprop",
            ),
            ({"block_stride": 1}, "block_stride=1 is for method=overlapping, not chunked"),
            ({"method": "greedy", "block_stride": 2}, "block_stride=2 is for method=overlapping, not greedy"),
            (
                {"method": "overlapping", "layers_per_block": 3, "block_stride": 4},
                "layers_per_block=3 with block_stride=4 leaves layers between the windows; use a stride from 2 to 2",
            ),
            (
                {"method": "overlapping", "block_stride": 2},
                "layers_per_block=2 with block_stride=2: windows do not overlap; use a smaller stride, or "
                "method=chunked",
            ),
            (
                {"method": "overlapping", "layers_per_block": 5, "block_stride": 2},
                "layers_per_block=5 with block_stride=2 puts layers into more than two windows, whose gradients would "
                "go further than one block; use a stride of 3 or more",
            ),
            (
                {"method": "overlapping", "layers_per_block": 1},
                "layers_per_block=1 with block_stride=1: windows of one layer cannot overlap; use layers_per_block=2 "
                "or more, or method=greedy",
            ),
            (
                {"method": "backprop", "final_backprop_steps": 2},
                "final_backprop_steps=2: every step of method=backprop is one; leave it out",
            ),
            (
                {"final_backprop_steps": 11, "max_steps": 10},
                "final_backprop_steps=11 is more than max_steps=10; lower it",
            ),
            ({"bf16": True, "fp16": True}, "both bf16 and fp16 are set; keep one"),
        ],
    )
    def test_each(self, changes, line):
        assert problems_of(**changes) == [line]

    def test_every_number_has_a_range_and_nothing_else_has(self):
        hints = {name: hint for section in SECTIONS for name, hint in get_type_hints(section).items()}
        numbers = [name for name, hint in hints.items() if {int, float} & {hint, *get_args(hint)}]
        assert sorted(numbers) == sorted(name for name, flag in FLAGS.items() if flag.range)

    @pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.range])
    def test_the_ends_of_a_range(self, name):
        wrong: dict[Any, tuple[list[float], str]] = {
            POSITIVE: ([0, -1], "must be greater than 0"),
            NOT_NEGATIVE: ([-1], "must not be negative"),
            RATE: ([1, -0.1], "must lie in [0, 1)"),
            STEPS: ([-1, 1.5], "must be a whole number of steps, or a share of them below 1"),
            SOME_STEPS: ([0, -1, 2.5], "must be a whole number of steps, or a share of them below 1, and more than 0"),
            SHARE: ([0, 1.1], "must lie in (0, 1]"),
        }
        values, says = wrong.get(FLAGS[name].range, ([0, 100], "must lie between 1 and 99"))
        for value in values:
            assert f"{name}={value} {says}" in problems_of(**{name: value})
        if FLAGS[name].range is NOT_NEGATIVE and name != "stage":  # which needs others
            assert problems_of(**{name: 0}) == []

    def test_a_default_is_one_of_the_choices_and_in_the_range(self):
        defaults = Config().flat()
        chosen = {name: defaults[name] for name, flag in FLAGS.items() if flag.choices and defaults[name] is not None}
        assert all(value in FLAGS[name].choices for name, value in chosen.items())
        given = {name: defaults[name] for name, flag in FLAGS.items() if flag.range and defaults[name] is not None}
        assert all(FLAGS[name].range.holds(value) for name, value in given.items())

    def test_not_a_number_is_no_rate(self):
        assert problems_of(learning_rate=float("nan")) == ["learning_rate=nan must be greater than 0"]

    def test_precisions_that_the_device_has_not(self):
        assert problems_of(fp16_supported=False, bf16_supported=False) == []
        fp16 = "fp16 is not supported on this device; use bf16, or neither for fp32"
        assert problems_of(fp16_supported=False, fp16=True) == [fp16]
        bf16 = "bf16 is not supported on this device; use fp16, or neither for fp32"
        assert problems_of(bf16_supported=False, bf16=True) == [bf16]

    def test_all_at_once(self):
        got = problems_of(method="x", max_steps=0, num_stages=3, bf16=True, fp16=True)
        assert [line.split()[0] for line in got] == ["method='x'", "max_steps=0", "4", "both"]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("4,4", [4, 4]), (" 1 , 2,3", [1, 2, 3]), ("7", [7]), ("", None), ("4,", None), ("a", None), ("²,3", None)],
)
def test_parse_stage_layers(text, layers):
    assert parse_stage_layers(text) == layers
