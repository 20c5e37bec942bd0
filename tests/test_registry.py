"""Methods and heads by their names."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llm_local.methods.method import Method, local_methods, register_method
from llm_local.registry import METHODS


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="there is a method 'greedy' already; choose another name"):
        register_method("greedy", Method())


def test_a_file_a_method():
    assert list(METHODS) == ["backprop", "chunked", "delayed", "greedy", "overlapping"]
    assert local_methods() == ["chunked", "greedy", "overlapping"]
    assert all(method.name == name for name, method in METHODS.items())


def test_whoever_reads_the_names_of_methods_does_not_wait_for_torch():
    code = "import sys, llm_local.config as c; c.Config().is_pipelined; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
