"""llm-local, the console script: a subcommand for each script, and two that need no repository.

Only the subcommand's own module is imported.
"""

from __future__ import annotations

import signal
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version

from llm_local.imports import quick_imports
from llm_local.program import COMMAND

# modules of llm_local.commands, with a dash for each underscore
COMMANDS = {
    "quickstart": "train a small Llama in stages on this machine; no data, model or network needed",
    "configs": "copy the configurations that come along into a folder, to be edited",
    "doctor": "show what this machine has for a run, and what to mend",
    "pretrain": "train one rank of a run, under torchrun, deepspeed, accelerate, srun or mpirun",
    "up": "train the stages as jobs of their own on this machine, each started again when it dies",
    "key": "make the key by which the jobs of a run know each other",
    "status": "show what the jobs of a run do",
    "plan": "rank the layouts of a model on a machine, by simulation",
    "prepare-data": "tokenise a run's data before the run",
    "inspect-data": "show what a model will see: rows, lengths, throughput",
    "train-tokenizer": "train a tokenizer on a run's data",
    "export": "make a model of a checkpoint, without the ranks that wrote it",
    "assemble": "make a model of the parts that each stage's job has left",
    "generate": "write text with an exported model, and measure an exit as its draft",
    "predict": "ask an exported model what stands for a mask, or what an image shows",
    "report": "make a page of a run, or of several side by side",
    "watch": "show a run while it goes on, as a page on this machine",
    "plot": "draw the losses of every stage of one run or several",
    "probe": "look inside a trained run: local against true gradients, the loss of every exit",
    "timeline": "show what each stage of a traced run did when",
    "study": "train a grid of settings and compare them",
}


def main(arguments: list[str] | None = None) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds, and Ctrl-C ends them without a traceback
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who reads it may have seen enough
        print(_help())
        return 0
    if name == "--version":
        print(f"llm_local {version('llm_local')}")
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        meant = f"did you mean {near[0]}?" if near else f"see {COMMAND} --help"
        print(f"{COMMAND}: unknown subcommand {name!r}; {meant}", file=sys.stderr)
        return 2
    with quick_imports():
        command = import_module(f"llm_local.commands.{name.replace('-', '_')}")
    return command.main(rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {COMMAND} SUBCOMMAND ...",
            "",
            "Pretrains Hugging Face language models by local parallelism on DeepSpeed.",
            "",
            *lines,
            "",
            f"{COMMAND} SUBCOMMAND --help describes its flags; {COMMAND} --version prints the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
