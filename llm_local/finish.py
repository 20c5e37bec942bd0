"""The end of a run: every stage exports, the exports are checked, and a person sees what came out."""

from __future__ import annotations

import math
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_local.anatomy import load_model_config
from llm_local.assembly import Engine
from llm_local.backprop import BackpropEngine
from llm_local.config import RunConfig
from llm_local.device import DTYPES
from llm_local.ds_config import load_json, zero_stage
from llm_local.engine import LocalEngine
from llm_local.export import LOGITS_TOLERANCE, check_export, collect, compose, exit_folder, write_stage
from llm_local.feed import Feed
from llm_local.packet import CHECK
from llm_local.preflight import Plan
from llm_local.progress import Progress
from llm_local.shared_head import folded
from llm_local.slices import Slice
from llm_local.stage import Block
from llm_local.tokenizer import load_tokenizer
from llm_local.world import World

SAMPLE_TOKENS = 80
CHECK_FILE = "check.safetensors"


def finish(config: RunConfig, plan: Plan, world: World, engine: Engine, feed: Feed | None, progress: Progress) -> None:
    """Exports and checks; every rank must call. Rank 0 composes what the stages wrote, and reports."""
    place = world.place
    export = config.output_dir / "export"
    exits = isinstance(engine, LocalEngine) and not config.local.head_features
    logits = engine.check_logits()
    bodies, head = _slices(engine)
    zero3 = zero_stage(load_json(config)) == 3
    tensors = collect(bodies, head, zero3, place.is_recorder, _folded(engine))
    seconds = float(config.train.ddp_timeout)
    has_head = exits or place.is_last_stage
    if place.is_recorder:
        write_stage(export, place.stage, place.num_stages, tensors, has_head)
        world.publish(f"export/{place.stage}", "written")
    if place.rank == 0:
        for stage in range(place.num_stages):
            world.fetch(f"export/{stage}", seconds, f"stage {stage} to write its shard")
        tokenizer = load_tokenizer(config)
        model_config = load_model_config(config.model)
        model_config.dtype = DTYPES[config.precision]
        assert feed is not None, "rank 0 reads the data"
        save_file(feed(CHECK, 0, 0).integer_parts(), export / CHECK_FILE)
        name = type(bodies[0].model).__name__
        compose(export, plan.partition, config.head_layers_schedule, model_config, name, tokenizer, exits)
        world.publish("export/all", "composed")
    if place.is_recorder and has_head:
        world.fetch("export/all", seconds, "rank 0 to compose the export")
        assert logits is not None
        _check(config, world, logits)
    if place.rank == 0:
        _report(config, world, progress, seconds, exits)


def _slices(engine: Engine) -> tuple[list[Slice], Slice | None]:
    """The layers of this stage, and the head of its last block."""
    if isinstance(engine, BackpropEngine):
        return [engine.part.part], None
    blocks = [engine.module for engine in engine.engines if isinstance(engine.module, Block)]
    return [block.body for block in blocks], blocks[-1].head


def _folded(engine: Engine) -> dict[str, torch.Tensor]:
    """What the exit's output matrix is where it is not the one that the head reads."""
    last: Any = engine.engines[-1].module
    return folded(last.head, last.temperature) if isinstance(last, Block) else {}


def _check(config: RunConfig, world: World, logits: torch.Tensor) -> None:
    """Compares this stage's exit, as transformers loads it, with the pipeline's logits on the same row of text."""
    place = world.place
    export = config.output_dir / "export"
    folder = export if place.is_last_stage else exit_folder(export, place.stage)
    ids = load_file(export / CHECK_FILE)["input_ids"]
    coarsest = max((config.precision, config.wire_dtype), key=LOGITS_TOLERANCE.__getitem__)
    options = {"trust_remote_code": config.model.trust_remote_code}
    line = check_export(folder, ids, logits, LOGITS_TOLERANCE[coarsest], **options)
    world.publish(f"checked/{place.stage}", line)


def _report(config: RunConfig, world: World, progress: Progress, seconds: float, exits: bool) -> None:
    """What a person sees at the end: the exports, every stage's validation loss, and some text."""
    place = world.place
    for stage in range(place.num_stages) if exits else (place.num_stages - 1,):
        progress.say(world.fetch(f"checked/{stage}", seconds, f"stage {stage} to check its export"))
    progress.show()
    export = config.output_dir / "export"
    (export / CHECK_FILE).unlink()
    if config.train.eval_batches:
        for stage in range(place.num_stages):
            loss = float(world.fetch(f"eval/{config.train.max_steps}/{stage}", seconds, f"stage {stage} to evaluate"))
            progress.say(f"stage {stage}: validation loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):,.1f}")
    early = f"an exit a stage: {export / 'exits'}; " if exits else ""
    early = "no exits, because of head_features; " if config.local.head_features else early
    progress.say(f"model: {export}; {early}metrics: {config.output_dir / 'metrics'}")
    if config.train.sample_prompt:
        progress.say(f"{export} writes:\n{_sample(config, config.train.sample_prompt)}")


def _sample(config: RunConfig, prompt: str) -> str:
    """The prompt and what the exported model writes after it, by seeded sampling."""
    export = config.output_dir / "export"
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(export, trust_remote_code=config.model.trust_remote_code).float()
    tokenizer = load_tokenizer(config)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(config.train.seed)
    eos = tokenizer.eos_token_id
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=True,
        temperature=0.7,
        top_k=50,
        pad_token_id=eos,
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
