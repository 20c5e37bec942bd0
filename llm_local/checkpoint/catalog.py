"""Checkpoints: what a folder of one holds, and reading it at any layout.

    OUTPUT/checkpoints/step-00000200/stage-00/replica-00.safetensors    this rank's stretch of every tensor of its stage
    OUTPUT/checkpoints/step-00000200/stage-00/replica-00-part-01.safetensors   the same of a replica's other ranks
    OUTPUT/checkpoints/step-00000200/stage-00/state.json                schedulers and loss scales of the stage's blocks
    OUTPUT/checkpoints/step-00000200/stage-00/replica-00/               where replicas are apart: each one's, of these
    OUTPUT/checkpoints/step-00000200/stage-00/outer.safetensors         and of the outer optimizer (outer_optimizer.py)
    OUTPUT/checkpoints/step-00000200/manifest.json                      the commit mark, written last

Tensors have the model's names (shards.py) and lie flat, in the safetensors format of torch.distributed.checkpoint
(hf_storage.py), so a reader takes the elements it wants wherever they lie. Loading runs no code from the files.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from llm_local.checkpoint.manifest import BrokenCheckpoint, read_manifest
from llm_local.checkpoint.shards import DELAYED, OUTER, PART, SCALAR, STATE, Stretch
from llm_local.model.tensor_cut import TensorCut

STATE_FILE = "state.json"
OUTER_FILE = "outer.safetensors"
_BYTES_AT_A_TIME = 32 * 2**20  # read in one go: the pages of the files stay mapped for as long as it lasts


class _StretchPlanner(DefaultLoadPlanner):
    """Reads stretches of flat tensors, in which torch.distributed.checkpoint sees whole ones."""

    def __init__(self, wanted: Mapping[str, Stretch]):
        super().__init__()
        self._wanted = wanted

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, stretch in self._wanted.items():
            here = ChunkStorageMetadata(torch.Size([stretch.start]), torch.Size([len(stretch.values)]))
            saved: Any = self.metadata.state_dict_metadata[name]
            items += create_read_items_for_chunk_list(name, saved, [here])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._wanted[index.fqn].values


class Catalog:
    """What a checkpoint holds, by name. Raises BrokenCheckpoint naming the file that is missing or damaged.

    blocks: state.json of the stages it holds. states, scalars: what the optimizer kept of a parameter, by its name.
    replica: whose tensors are read, where they are apart, and of how many; of stages with as many. Of others, and where
    it is None, the mean of all is.
    """

    def __init__(self, checkpoint: Path, replica: tuple[int, int] | None = None):
        self.path, self.replica = checkpoint, replica
        self.manifest = read_manifest(checkpoint)
        self.blocks: list[dict[str, Any]] = []
        self.states: dict[str, list[str]] = {}
        self.scalars: dict[str, list[str]] = {}
        self._numels: dict[str, int] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._folders: dict[str, tuple[Path, ...]] = {}  # of a mean, those of all its parts
        self._cuts: dict[str, TensorCut] = {}  # of parameters that are there in parts
        for stage in self.manifest.held():
            folder, replicas = checkpoint / f"stage-{stage:02d}", range(self.manifest.layout.stage_replicas[stage])
            if not self.manifest.apart:
                self._add_blocks(folder)
                flags = self.manifest.flags
                parts = range(flags.get("tensor_parallel_size", 1))
                ranks = range(len(replicas) * flags.get("sequence_parallel_size", 1))
                self._add(folder, [replica_file(each, part) for each in ranks for part in parts])
                continue
            self._add(folder, [OUTER_FILE])
            wanted = replicas[replica[0] :][:1] if replica and replica[1] == len(replicas) else replicas
            self._add_blocks(replica_folder(folder, wanted[0]))
            for each in wanted:
                self._add(replica_folder(folder, each), [replica_file(each)])

    def _add_blocks(self, folder: Path) -> None:
        try:
            blocks = json.loads((folder / STATE_FILE).read_text())
            self.blocks += blocks
            cuts = {name: cut for block in blocks for name, cut in block.get("cuts", {}).items()}
            self._cuts |= {name: TensorCut(**cut | {"shape": tuple(cut["shape"])}) for name, cut in cuts.items()}
        except (OSError, ValueError) as error:
            raise BrokenCheckpoint(folder / STATE_FILE, error) from error

    def _add(self, folder: Path, files: Iterable[str]) -> None:
        for path in (folder / file for file in files):
            try:
                with safe_open(path, "pt"):  # a truncated file shows by its header
                    pass
            except (OSError, SafetensorError) as error:
                raise BrokenCheckpoint(path, error) from error
        for name, found in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
            tensor: Any = found
            self._folders[name] = (*self._folders.get(name, ()), folder)
            if len(self._folders[name]) > 1:
                continue
            self._dtypes[name] = tensor.properties.dtype
            if PART in name:  # known by the name of the whole, which the first part gives
                name, _, number = name.partition(PART)
                if number != "0":
                    continue
            cut = self._cut_of(name)
            self._numels[name] = tensor.size.numel() if cut is None else cut.numel
            for kept, mark in ((self.states, STATE), (self.scalars, SCALAR)):
                if mark in name:
                    kept.setdefault(name.partition(mark)[0], []).append(name)

    @property
    def weights(self) -> list[str]:
        """Names of the parameters and buffers."""
        marks = (STATE, SCALAR, OUTER, DELAYED)
        return [name for name in self._numels if not any(mark in name for mark in marks)]

    def source(self, name: str, numel: int) -> str | None:
        """The name under which the checkpoint has a tensor of so many elements; another one where it was tied."""
        if name not in self._numels:
            name = next((block["tied"][name] for block in self.blocks if name in block["tied"]), name)
        return name if self._numels.get(name) == numel else None

    def _cut_of(self, name: str) -> TensorCut | None:
        """Of a parameter that is there in parts, or of a state of one."""
        return None if SCALAR in name else self._cuts.get(name.partition(STATE)[0])

    def read(self, wanted: Mapping[str, Stretch]) -> None:
        """Fills the stretches, in whatever dtype they have, from the tensors of these names."""
        in_parts = {n: stretch for n, stretch in wanted.items() if stretch.cut is not None or self._cut_of(n)}
        for name, stretch in in_parts.items():
            tensor = self.tensor(name)  # of any cut, whole for as long as this takes
            tensor = tensor if stretch.cut is None else stretch.cut.part(tensor).view(-1)
            with torch.no_grad():
                stretch.values.copy_(tensor.narrow(0, stretch.start, len(stretch.values)))
        self._read({name: stretch for name, stretch in wanted.items() if name not in in_parts})

    def _read(self, wanted: Mapping[str, Stretch]) -> None:
        batches: dict[tuple[Path, ...], list[dict[str, Stretch]]] = {}
        for name, stretch in wanted.items():
            found = batches.setdefault(self._folders[name], [{}])
            if sum(other.values.nbytes for other in found[-1].values()) >= _BYTES_AT_A_TIME:
                found.append({})
            found[-1][name] = stretch
        for folders, some in ((folders, some) for folders, found in batches.items() for some in found):
            if len(folders) == 1:
                _load(folders[0], some)
            else:
                self._load_mean(folders, some)

    def _load_mean(self, folders: Sequence[Path], wanted: Mapping[str, Stretch]) -> None:
        """Of what is a whole number, the first one's."""
        means: dict[str, torch.Tensor] = {}
        for count, folder in enumerate(folders, start=1):
            one = {n: replace(s, values=torch.empty(len(s.values), dtype=self._dtypes[n])) for n, s in wanted.items()}
            _load(folder, one)
            for name, stretch in one.items():
                mean = means.setdefault(name, stretch.values)
                if mean.is_floating_point():
                    mean += (stretch.values - mean) / count  # of equal numbers that number
        with torch.no_grad():
            for name, stretch in wanted.items():
                stretch.values.copy_(means[name])

    def tensor(self, name: str) -> torch.Tensor:
        """The whole of one, flat."""
        cut = self._cut_of(name)
        names = [name] if cut is None else [f"{name}{PART}{rank}" for rank in range(cut.ranks)]
        numel = self._numels[name] // len(names)
        parts = {part: Stretch(numel, 0, torch.empty(numel, dtype=self._dtypes[part])) for part in names}
        self._read(parts)
        found = [stretch.values for stretch in parts.values()]
        return found[0] if cut is None else cut.whole(found).reshape(-1)


def _load(folder: Path, wanted: Mapping[str, Stretch]) -> None:
    reader, planner = HuggingFaceStorageReader(str(folder)), _StretchPlanner(wanted)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load({n: s.values for n, s in wanted.items()}, storage_reader=reader, planner=planner, no_dist=True)


def replica_folder(stage_folder: Path, replica: int) -> Path:
    """Of a replica that has tensors of its own."""
    return stage_folder / f"replica-{replica:02d}"


def replica_file(replica: int, tensor_rank: int = 0) -> str:
    part = f"-part-{tensor_rank:02d}" if tensor_rank else ""
    return f"replica-{replica:02d}{part}.safetensors"


def save_stretches(tensors: dict[str, torch.Tensor], starts: Mapping[str, int], path: Path) -> None:
    """A replica's file: flat tensors, each with the first of its elements in the whole, 0 if not said."""
    offsets = {name: {"saved_offsets": [starts.get(name, 0)]} for name in tensors}
    save_tensors(tensors, path, {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"})


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that others may read as far as the umask lets them; the library's own are for the owner."""
    save_file(tensors, path, metadata=metadata)
    path.chmod(0o666 & ~_umask())


@cache
def _umask() -> int:
    mask = os.umask(0o077)  # there is no way to read it but to set it, for all threads
    os.umask(mask)
    return mask
