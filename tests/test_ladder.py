"""The imports of the package form a ladder: a module imports only modules of lower rungs."""

import ast
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pytest

import llm_local

# a line is a rung: modules, or a package and its modules
LADDER = """
adapters: torch_internals hf_internals deepspeed_internals
program ancestors imports files records screen in_flight registry flags partition costs
methods: schedule soft_targets final_steps method backprop delayed chunked greedy overlapping
tasks: task causal_lm masked_lm image_classification
trainer_flags flag_values config replicas head_plan
simulator: peer_schedules channel clock simulate failures
owner device room aside launch trace stopping peer watchdog rendezvous place world
links: packet wire message link transports dealt together ends links
jobs: segment packet_log fullness positions key frames hello ways side conversation channel ends
model: gguf_header gguf_cache levels observation remote_code overrides token_ids model_config anatomy standins
model: slices pretrained classes tensor_cut tensor_parallel loss router_loss sequence_parallel document_mask
model: distillation
model.heads: head decoder linear shared
model: lora lowrank windows head_start block stage refresh
head_problems job_problems problems cut
data: corpus text_files parts text_parts encoding token_folder mixture packing sentencepieces tokenizer special_tokens
data: source_problems sources digits image_files image_processor image_sources images objects sequences
data: tokenizer_training streams prepared run_data image_sets sets feed
ds_config ds_problems tensor_problems sequence_problems reporting block_engine results engine backprop
checkpoint: manifest shards catalog line saver loader
export: masters model_folder adapter stages parts model_card sample reading
memory: engine division activations sizes parts stage
metrics bars progress evaluation setup
timeline: measured chrome_trace replay picture
checks: devices epochs profile tiny trial tensor_trial sequence_trial exit_check class_problems tokenizer_check
checks: weight_problems engine_trial memory_check output_folder preflight
job_status job_start job
report: curves library notes facts read charts tables now timeline page
examine delayed_engine assembly outer_optimizer run_trace recorder rank rank_step best finish
training_arguments callbacks run start train trainer
offline_export
coverage: model_type run report
study: points comparison runs
plan: times machine stages layouts divisions splits failing report search
bench: saved_bytes plain peers task measures worker figures cases calibration relay hosts curves largest
bench: mfu gpu_runs gpu_bundle gpu_speed gpu_steps gpu_day gpu_page
commands: configs quickstart pretrain prepare_data inspect_data train_tokenizer plan export assemble generate predict
commands: report plot probe key doctor status up watch timeline study
cli
"""
PACKAGE = Path(llm_local.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem != "__init__")


def rungs() -> list[str]:
    """'config', ..., 'simulator.clock', ..., bottom rung last."""
    found = []
    for line in LADDER.split("\n"):
        package, colon, names = line.rpartition(":")
        found += [f"{package}.{name}" if colon else name for name in names.split()]
    return found


RUNGS = rungs()


def rung_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported_modules(source: str, among: Sequence[str] = RUNGS) -> set[str]:
    """Names of the package's modules that a module of it imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports say the whole name"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.removeprefix("llm_local.") for name in names if name.startswith("llm_local.")}
    return {rung for rung in among for name in ours if name == rung or name.startswith(f"{rung}.")}


@pytest.mark.parametrize("path", MODULES, ids=rung_of)
def test_a_module_stands_on_the_ladder_and_imports_lower_rungs_only(path: Path):
    name = rung_of(path)
    assert name in RUNGS, f"{path.name} has no rung: add it to the ladder of this test, where its imports allow"
    above = sorted(imported_modules(path.read_text()) - set(RUNGS[: RUNGS.index(name)]))
    assert not above, f"{path.name} imports {', '.join(above)}, which is not on a lower rung"


def test_no_module_has_two_rungs():
    assert len(set(RUNGS)) == len(RUNGS)
    assert set(RUNGS) == {rung_of(path) for path in MODULES}


def test_a_package_is_one_rung():
    """Packages import one way, too."""
    packages = [name.partition(".")[0] for name in RUNGS if "." in name]
    assert len({*packages}) == sum(1 for _ in groupby(packages))


@pytest.mark.parametrize(
    "source",
    [
        "import llm_local.train",
        "import llm_local.train as t, os",
        "from llm_local.train import run",
        "from llm_local import train",
        "def late():\n    from llm_local import train",
        "if TYPE_CHECKING:\n    from llm_local.train import run",
    ],
)
def test_every_form_of_import_is_seen(source: str):
    assert imported_modules(source) == {"train"}
    inner = source.replace("llm_local import train", "llm_local.plan import stages")
    assert imported_modules(inner.replace("llm_local.train", "llm_local.plan.stages")) == {"plan.stages"}


def test_other_packages_are_not_ours():
    assert imported_modules("import os, llm_localish.train\nfrom deepspeed.runtime import engine") == set()
