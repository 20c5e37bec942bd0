"""What a model is trained for: tasks by their names, and what each makes of a row."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from llm_local.flags import ModelArguments
from llm_local.model.anatomy import SliceError, probe
from llm_local.registry import TASKS
from llm_local.tasks.causal_lm import CausalLM
from llm_local.tasks.task import IGNORED, register_task


def test_a_file_a_task():
    assert list(TASKS) == ["causal-lm", "image-classification", "masked-lm"]
    assert all(task.name == name for name, task in TASKS.items())
    with pytest.raises(ValueError, match="there is a task 'causal-lm' already; choose another name"):
        register_task("causal-lm", CausalLM())


def test_causal_lm_scores_what_comes_next():
    states, ids = torch.arange(12.0).reshape(1, 4, 3), torch.tensor([[5, 6, 7, 8]])
    read, targets = CausalLM().scored(states, ids, None)
    assert torch.equal(read, states[0, :3])
    assert targets.tolist() == [6, 7, 8]
    labels = torch.tensor([[5, IGNORED, 7, IGNORED]])
    assert CausalLM().scored(states, ids, labels)[1].tolist() == [IGNORED, 7, IGNORED]
    assert CausalLM().count_scored(labels).tolist() == [1]


def test_a_type_that_has_no_model_for_the_task_is_refused():
    with pytest.raises(
        SliceError, match=r"^task=causal-lm: transformers has no causal language model of model type 'vi"
    ):
        probe(AutoConfig.for_model("vit"), ModelArguments())
