"""What is private to DeepSpeed, torch and transformers is used in adapters alone, and is there in the versions that are
installed."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import llm_local
from llm_local.adapters import deepspeed_internals, hf_internals, torch_internals

ADAPTERS = (deepspeed_internals, hf_internals, torch_internals)
ROOT = Path(llm_local.__file__).parents[1]
SOURCES = sorted(p for folder in ("llm_local", "scripts") for p in (ROOT / folder).rglob("*.py"))
OTHERS = [path for path in SOURCES if path.parent.name != "adapters"]
NAMES = [(adapter, module, name) for adapter in ADAPTERS for module, names in adapter.USED.items() for name in names]
OF_DEEPSPEED = {name for names in deepspeed_internals.USED.values() for name in names}
PUBLIC = {"_exit"}  # of os


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def words(tree: ast.AST) -> set[str]:
    """All names that the code has: variables, attributes, functions, classes, arguments, what it imports, strings."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                found.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Constant(value=str(name)):
                found.add(name)
            case ast.Import(names=names):
                found |= {part for alias in names for part in alias.name.split(".")}
            case ast.ImportFrom(module=module, names=names):
                found |= {*(module or "").split("."), *(name for a in names for name in (a.name, a.asname or a.name))}
    return found


def own(tree: ast.AST) -> set[str]:
    """Names that the code gives to something: variables, functions, classes, attributes of self."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                found.add(name)
    return found


def foreign(source: str) -> set[str]:
    """Private names of others in the code: any that it does not give to something itself, or of OF_DEEPSPEED.

    A string is a name where it says which attribute. Of DeepSpeed more is private than what has an underscore.
    """
    tree = ast.parse(source)
    used, strings, asked = words(tree), set(), set()
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(name)):
                strings.add(name)
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=name), *_]):
                asked.add(name)
    found = used - strings | asked
    return {name for name in found - own(tree) - PUBLIC if is_private(name)} | (used & OF_DEEPSPEED)


@pytest.mark.parametrize(("adapter", "module", "name"), NAMES, ids=lambda value: getattr(value, "__name__", value))
def test_a_name_is_there(adapter, module: str, name: str):
    there = words(ast.parse(inspect.getsource(importlib.import_module(module))))
    assert name in there, f"{module} has no {name} any more, on which {adapter.__name__} relies"


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.__name__)
def test_an_adapter_lists_what_it_uses(adapter):
    tree = ast.parse(inspect.getsource(adapter))
    listed = {name for names in adapter.USED.values() for name in names}
    modules = {part for module in adapter.USED for part in module.split(".")}
    statements = [node for node in tree.body if "USED" not in ast.unparse(node)[:5]]
    used = words(ast.Module(statements, []))
    assert {name for name in used if is_private(name) and name.isidentifier()} <= listed | modules
    assert listed <= used, "listed, and not used"


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_private_is_used_elsewhere(path: Path):
    names = sorted(foreign(path.read_text()))
    assert not names, f"{path.name} uses {', '.join(names)}: a function of llm_local/adapters is the place for that"


@pytest.mark.parametrize(
    "source",
    [
        "from torch._dynamo import config",
        "import torch._inductor",
        "from transformers.utils import _secret",
        "model._secret",
        "self._engine._secret = 1",
        "getattr(model, '_secret')",
        "parameter.ds_tensor",
    ],
)
def test_every_use_is_seen(source: str):
    assert foreign(source)


def test_what_a_module_has_itself_is_its_own():
    assert not foreign("class A:\n def __init__(self): self._x = 1\n def _y(self): return self._x\n_z = A()._y()")
