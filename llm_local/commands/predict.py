"""Asks an exported model that writes no text: what stands for a mask, what an image shows.

llm-local predict --export runs/modernbert/export "import [MASK]" [--top_k 3] [--exit stage-00] [--json]

Without inputs it reads them from its standard input, a line each. With --json a line is an object with what was given
and the answer of transformers' pipeline.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers

from llm_local.export.reading import add_arguments, find_device, find_exit, load, loading, model_class, read_tokenizer
from llm_local.program import COMMAND, command_parser, program
from llm_local.tasks.task import Task

NAME = program(__file__)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(NAME, __doc__)
    parser.add_argument("inputs", nargs="*", help="sentences with [MASK], or files of images; default: lines of stdin")
    parser.add_argument("--export", type=Path, required=True, help="folder of the model: OUTPUT/export of a run")
    parser.add_argument("--exit", help="ask this one instead: its name under EXPORT/exits, stage-00")
    parser.add_argument("--top_k", type=int, default=5, help="so many answers, the likeliest first (5)")
    parser.add_argument("--json", action="store_true", help="an object a line")
    add_arguments(parser)
    return parser.parse_args(arguments)


def find_task(folder: Path) -> Task:
    """Of the export. Raises ValueError for one that is not asked."""
    name, task = model_class(folder)
    if task is not None and task.generates:
        raise ValueError(f"--export {folder} is a {name}, which writes text; use {COMMAND} generate")
    if task is None or not task.answer:
        raise ValueError(f"--export {folder} is a {name or 'model of no class'}, which {NAME} knows no pipeline for")
    return task


def read_processing(folder: Path, task: Task, trusted: bool) -> dict[str, Any]:
    """What the export has beside its model, by its name in a pipeline. Raises ValueError naming the folder."""
    if not task.reads_images:
        return {"tokenizer": read_tokenizer(folder, trusted)}
    try:
        return {"image_processor": transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=trusted)}
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no image processor: {str(error).strip().splitlines()[0]}") from error


def question(line: str, task: Task, model: Any, processing: Any) -> Any:
    """What the pipeline is asked of a line; of an image's file the image, as training reads it. Raises ValueError."""
    if not task.reads_images:
        return task.question(line, processing)
    from llm_local.data.image_files import UnreadableImage, read_image  # text needs no Pillow

    try:
        return read_image({"path": line}, task.row_shape(model.config)[0])
    except UnreadableImage as error:
        raise ValueError(f"{line} {error}") from error


def show(given: str, answers: list[Any], key: str) -> None:
    """Prints the answers; of a sentence with several masks, one mask after the other."""
    several = answers if isinstance(answers[0], list) else [answers]
    for number, found in enumerate(several):
        print(given if len(several) == 1 else f"{given}  (mask {number + 1})")
        for each in found:
            print(f"  {each['score']:.4f}  {each[key]}")


def predict(given: argparse.Namespace, lines: Iterable[str]) -> int:
    """Loads, asks and prints. lines: asked where no input is given. Raises ValueError for what cannot be done; returns
    the exit status."""
    if given.top_k < 1:
        raise ValueError(f"--top_k {given.top_k} is less than 1")
    task = find_task(given.export)
    folder = given.export if given.exit is None else find_exit(given.export, "--exit", given.exit)
    device = find_device(given.device)
    beside = read_processing(folder, task, given.trust_remote_code)
    model = load(folder, task.loader, device, **loading(given))
    make: Any = transformers.pipeline
    ask: Any = make(task.pipeline_tag, model=model, device=device, **beside)
    (processing,) = beside.values()
    for line in given.inputs or (line.rstrip("\n") for line in lines):
        try:
            answers = ask(question(line, task, model, processing), top_k=given.top_k)
        except (IndexError, RuntimeError) as error:  # too long a text, say
            raise ValueError(f"{line!r} cannot be read by the model: {str(error).strip().splitlines()[0]}") from error
        if given.json:
            print(json.dumps({"input": line, "predictions": answers}), flush=True)
        else:
            show(line, answers, task.answer)
    return 0


def main(arguments: list[str]) -> int:
    given = parse(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return predict(given, sys.stdin)
    except ValueError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
