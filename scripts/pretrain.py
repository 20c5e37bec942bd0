"""Pretrains a language model on pipeline stages; see README.md, or --help for the flags.

deepspeed --num_gpus N scripts/pretrain.py CONFIG.yaml [--name value ...]      (also torchrun, accelerate launch)
"""

import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds, and Ctrl-C ends them without a traceback

from llm_local.commands.pretrain import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
