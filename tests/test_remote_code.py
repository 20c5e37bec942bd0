"""Models that bring code along: run if that is allowed, all there before the start, and exported whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, from_flat, parse
from llm_local.data.tokenizer import builtin_tokenizer_dir, load_tokenizer
from llm_local.export.model_folder import Description, complete, shard_name, write_shard
from llm_local.flags import ModelArguments
from llm_local.model.model_config import load_model_config
from llm_local.model.remote_code import read_code

ROOT = Path(__file__).parent.parent
CODE = {
    "configuration_tiny.py": """
from transformers import LlamaConfig

class TinyConfig(LlamaConfig):
    model_type = "tiny_code"
""",
    "parts_tiny.py": """
from transformers.models.llama.modeling_llama import LlamaRMSNorm

class TwiceRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)
""",
    "modeling_tiny.py": """
from transformers import LlamaForCausalLM

from .configuration_tiny import TinyConfig
from .parts_tiny import TwiceRMSNorm

class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.norm = TwiceRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()
""",
    "tokenization_tiny.py": """
from transformers import PreTrainedTokenizerFast

class TinyTokenizer(PreTrainedTokenizerFast):
    pass
""",
}
MAP = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
REPAIR = "holds code of its own; read it, and let it run with --trust_remote_code true"


def brings_code(folder: Path, auto_map: dict[str, Any] | None = None, model_type: str = "tiny_code") -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in CODE.items():
        (folder / name).write_text(text)
    values = TINY | {"model_type": model_type, "auto_map": auto_map or MAP}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def tokenizer_with_code(folder: Path, cache: Path, class_name: str = "TinyTokenizer") -> None:
    AutoTokenizer.from_pretrained(builtin_tokenizer_dir(cache)).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": class_name,
        "auto_map": {"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def refusal(**named: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        load_model_config(ModelArguments(**named))
    (problem,) = refused.value.problems
    assert "\n" not in problem
    return problem


def test_code_runs_with_the_flag_alone(tmp_path: Path, cache: Path):
    folder = brings_code(tmp_path / "tiny")
    assert refusal(config_name=str(folder)) == f"config_name={folder} {REPAIR}"
    assert refusal(model_name_or_path=str(folder)) == f"model_name_or_path={folder} {REPAIR}"
    for name in (folder, folder / "config.json"):
        config = load_model_config(ModelArguments(config_name=str(name), trust_remote_code=True))
        assert type(config).__name__ == "TinyConfig"
    tokenizer_with_code(folder, cache)
    flags = {"config_name": str(folder), "tokenizer_name": str(folder)}
    with pytest.raises(ConfigError) as refused:
        load_tokenizer(from_flat(flags))
    assert refused.value.problems == [f"the tokenizer of tokenizer_name={str(folder)!r} {REPAIR}"]
    assert type(load_tokenizer(from_flat(flags | {"trust_remote_code": True}))).__name__ == "TinyTokenizer"


def test_without_the_flag_a_known_type_is_the_class_of_transformers(tmp_path: Path, cache: Path):
    """And its export names no code, as it has none."""
    folder = brings_code(tmp_path / "tiny", model_type="llama")
    config = load_model_config(ModelArguments(config_name=str(folder)))
    assert type(config) is LlamaConfig
    assert not hasattr(config, "auto_map")
    tokenizer_with_code(folder, cache, "PreTrainedTokenizerFast")
    load_tokenizer(from_flat({"config_name": str(folder), "tokenizer_name": str(folder)})).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    folder = brings_code(tmp_path / "encoder", {"AutoModelForCausalLM": MAP["AutoModelForCausalLM"]}, "vit")
    assert refusal(config_name=str(folder)) == f"config_name={folder} {REPAIR}"


@pytest.mark.parametrize("missing", ["configuration_tiny.py", "modeling_tiny.py", "parts_tiny.py"])
def test_a_file_that_is_missing_is_named_before_the_start(trainer: Trainer, tmp_path: Path, missing: str):
    folder = brings_code(tmp_path / "tiny")
    (folder / missing).unlink()
    with pytest.raises(ConfigError) as refused:
        preflight(parse(trainer.flags("run", config_name=folder, trust_remote_code=True)), 1)
    (problem,) = refused.value.problems
    assert missing in problem
    assert "\n" not in problem
    if missing != "configuration_tiny.py":  # without which there is no config either
        assert problem.startswith(f"config_name={folder} names code in its auto_map, modeling_tiny.TinyForCausalLM, ")


@pytest.mark.parametrize("text", ["import no_such_package", "class TinyConfig(", "Tiny = no_such_name", "TinyConf = 1"])
@pytest.mark.parametrize("file", ["configuration_tiny.py", "modeling_tiny.py"])
def test_code_that_does_not_run_is_one_line_before_the_start(trainer: Trainer, tmp_path: Path, file: str, text: str):
    folder = brings_code(tmp_path / "tiny")
    (folder / file).write_text(text)
    with pytest.raises(ConfigError) as refused:
        preflight(parse(trainer.flags("run", config_name=folder, trust_remote_code=True)), 1)
    (problem,) = refused.value.problems
    assert "\n" not in problem


def test_code_of_another_folder_comes_along(tmp_path: Path, cache: Path):
    other = brings_code(tmp_path / "other")
    folder = brings_code(tmp_path / "tiny", MAP | {"AutoModelForCausalLM": f"{other}--{MAP['AutoModelForCausalLM']}"})
    (folder / "modeling_tiny.py").unlink()
    config = load_model_config(ModelArguments(config_name=str(folder), trust_remote_code=True))
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(builtin_tokenizer_dir(cache))
    shard = tmp_path / "out" / shard_name(0, 1)
    write_shard(shard, model.state_dict())
    complete(shard.parent, [shard], Description(config, "TinyForCausalLM", tokenizer, code=read_code(config)), {})
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["auto_map"] == MAP
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == set(CODE) - {"tokenization_tiny.py"}


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    logits = model.eval()(input_ids=torch.arange(8).reshape(1, -1)).logits
    print(type(model).__name__, type(tokenizer).__name__, float(logits.double().abs().sum()))
"""


@pytest.mark.processes
def test_exports_have_the_code_of_model_and_tokenizer(
    trainer: Trainer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The run compares them with its pipeline; another process finds all in the folders alone."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "export", raising=False)
    import export
    import generate

    folder = brings_code(tmp_path / "tiny")
    config = load_model_config(ModelArguments(config_name=str(folder), trust_remote_code=True))
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(folder)
    tokenizer_with_code(folder, cache)
    source = {"config_name": None, "model_name_or_path": folder, "trust_remote_code": True}
    run = trainer.run("run", 2, num_stages=2, max_steps=1, save_steps=1, eval_batches=0, **source)
    out, whole = tmp_path / "out", run / "export"
    assert export.main([str(run / "checkpoints/step-00000001"), str(out)]) == 0
    assert 'from_pretrained("export", trust_remote_code=True)' in (whole / "README.md").read_text()
    capsys.readouterr()
    assert generate.main(["--export", str(whole), "--prompt", "x"]) == 2
    assert capsys.readouterr().err.endswith("read it, and let it run with --trust_remote_code\n")
    folder.rename(tmp_path / "gone")
    folders = [whole, out, whole / "exits/stage-00"]
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, folders)],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert fresh.returncode == 0, fresh.stderr
    names, sums = zip(*(line.rsplit(" ", 1) for line in fresh.stdout.splitlines()), strict=True)
    assert set(names) == {"TinyForCausalLM TinyTokenizer"}
    assert sums[0] == sums[1]
    again = AutoModelForCausalLM.from_pretrained(whole, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = again(input_ids=torch.arange(8).reshape(1, -1)).logits
    assert float(logits.double().abs().sum()) == pytest.approx(float(sums[0]), rel=1e-6)
