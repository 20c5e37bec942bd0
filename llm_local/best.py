"""The checkpoint with the lowest validation loss, which load_best_model_at_end exports in place of the last step."""

from __future__ import annotations

from llm_local.checkpoint.catalog import Catalog
from llm_local.checkpoint.line import checkpoint_of
from llm_local.checkpoint.loader import install_saved, load_engines
from llm_local.checkpoint.manifest import read_data_state
from llm_local.data.feed import trained_tokens
from llm_local.metrics import best_step
from llm_local.rank import Rank
from llm_local.records import read_records


def load_best(run: Rank, last: int) -> int:
    """Puts the run, which has ended with the step `last`, where its best checkpoint stands; returns that step. Every
    rank must call, when all has been evaluated and saved. Raises BrokenCheckpoint."""
    world, place = run.world, run.world.place
    seconds = float(run.config.train.ddp_timeout)
    world.everybody("best/saved", seconds, "the others to save and evaluate")
    if place.is_last_stage and place.is_recorder:
        found = best_step(run.config.output_dir, place.num_stages)
        world.publish("best/step", str(last if found is None else found))
    step = int(world.fetch("best/step", seconds, "the last stage to choose a checkpoint"))
    if step == last:
        return step
    catalog = Catalog(checkpoint_of(run.config.output_dir, step))
    load_engines(catalog, run.engine.engines, world.shard)
    for block in run.engine.blocks:
        install_saved(catalog, block)
    if run.metrics is not None:  # what an earlier life of the run measured
        for record in read_records(run.metrics.path):
            if record["step"] == step and record["split"].startswith("eval"):
                losses = " ".join(map(str, record["block_losses"]))
                world.publish(f"{record['split']}/{step}/{place.stage}", losses)
    if run.feed is not None:
        manifest, state = catalog.manifest, read_data_state(catalog.path)
        run.feed.tokens = trained_tokens(state, manifest.rows, manifest.layout.seq_length)
    run.progress.say(f"llm_local: {catalog.path.name} has the lowest validation loss, and is exported")
    return step
