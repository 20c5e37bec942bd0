"""The imports of the package form a ladder: a module imports only modules of lower rungs."""

import ast
from pathlib import Path

import pytest

import llm_local

LADDER = """
config partition costs head_plan head_problems problems schedule peer_schedules clock simulate
device trace watchdog world packet wire links
gguf_cache observation anatomy standins slices pretrained heads router_loss document_mask
shared_head distillation lowrank windows head_start stage refresh
corpus text_files parts text_parts encoding token_folder mixture packing sentencepieces tokenizer
source_problems sources sequences tokenizer_training streams prepared data feed
ds_config block_engine engine backprop
shards checkpoint saver loader
masters model_folder export model_card metrics progress timeline chrome_trace
profile tiny trial exit_check class_problems weight_problems preflight examine assembly
run_trace evaluation recorder finish train
offline_export points comparison study replay timeline_picture coverage coverage_run coverage_report
saved_bytes bench_peers bench_worker benchmark relay
plan_times plan_machine plan_memory plan_model plan_stages plan_layouts plan_report plan_search
""".split()  # noqa: SIM905

MODULES = sorted(path for path in Path(llm_local.__file__).parent.glob("*.py") if path.stem != "__init__")


def imported_modules(source: str) -> set[str]:
    """Names of the package's modules that a module of it imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ("llm_local." if node.level else "") + (node.module or "")
            # `from llm_local import config` and `from . import config` name the module after `import`.
            is_package = package.rstrip(".") == "llm_local"
            names |= {f"llm_local.{alias.name}" for alias in node.names} if is_package else {package}
    return {name.split(".")[1] for name in names if name.startswith("llm_local.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_stands_on_the_ladder_and_imports_lower_rungs_only(path):
    assert path.stem in LADDER, f"{path.name} has no rung: add it to the ladder of this test, where its imports allow"
    lower = LADDER[: LADDER.index(path.stem)]
    above = sorted(imported_modules(path.read_text()) - set(lower))
    assert not above, f"{path.name} imports {', '.join(above)}, which is not on a lower rung"


def test_no_module_has_two_rungs():
    assert len(set(LADDER)) == len(LADDER)


@pytest.mark.parametrize(
    "source",
    [
        "import llm_local.train",
        "import llm_local.train as t, os",
        "from llm_local.train import run",
        "from llm_local import train",
        "from . import train",
        "from .train import run",
        "def late():\n    from llm_local import train",
        "if TYPE_CHECKING:\n    from llm_local.train import run",
    ],
)
def test_every_form_of_import_is_seen(source):
    assert imported_modules(source) == {"train"}


def test_other_packages_are_not_ours():
    assert imported_modules("import os, llm_localish.train\nfrom deepspeed.runtime import engine") == set()
