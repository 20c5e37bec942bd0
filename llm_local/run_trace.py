"""The trace of a run from its side: begun by every rank, ended by every rank, joined by rank 0."""

from __future__ import annotations

import uuid
from functools import partial

from llm_local.assembly import Engine
from llm_local.config import Config
from llm_local.device import finish_queued_work
from llm_local.links.links import Links
from llm_local.timeline.chrome_trace import write_chrome_trace
from llm_local.timeline.measured import read_trace
from llm_local.trace import TraceHeader, Tracer, read_clock
from llm_local.world import World

_RUN = "trace/run"


def begin_trace(config: Config, world: World, engine: Engine, links: Links) -> Tracer | None:
    """Has engine and links record what they do, if the run asks for it. Every rank must call."""
    if not config.train.trace:
        return None
    place, seconds = world.place, float(config.train.ddp_timeout)
    if place.rank == 0:
        world.publish(_RUN, uuid.uuid4().hex)
    header = TraceHeader(
        run=world.fetch(_RUN, seconds, "rank 0 to begin the trace"),
        stage=place.stage,
        replica=place.replica,
        num_stages=place.num_stages,
        num_replicas=place.num_replicas,
        method=config.local.method,
        max_packets_in_flight=None if config.is_pipelined else config.local.max_packets_in_flight,
        device=world.device_names[place.rank].identity,
    )
    on_a_cpu = world.device.type == "cpu"
    tracer = Tracer(config.output_dir, header, None if on_a_cpu else partial(finish_queued_work, world.device))
    engine.trace(tracer)
    links.trace(tracer)  # before a neighbour may send
    tracer.start(read_clock(world, place.rank, place.world_size, "start", seconds))
    return tracer


def end_trace(tracer: Tracer | None, config: Config, world: World) -> None:
    """Writes what is left; rank 0 waits for all, and joins their files. Every rank must call."""
    if tracer is None:
        return
    place, seconds = world.place, float(config.train.ddp_timeout)
    tracer.close(read_clock(world, place.rank, place.world_size, "end", seconds))
    world.publish(f"trace/{place.rank}", "written")
    if place.rank == 0:
        for rank in range(place.world_size):
            world.fetch(f"trace/{rank}", seconds, f"rank {rank} to write its trace")
        write_chrome_trace(read_trace(config.output_dir))
