"""Pretrains a language model on pipeline stages; see README.md, or --help for the flags.

deepspeed --num_gpus N scripts/pretrain.py CONFIG.yaml [--name value ...]      (also torchrun, accelerate launch)
"""

import os
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds, and Ctrl-C ends them without a traceback

from llm_local.ancestors import end_with_launcher  # noqa: E402

end_with_launcher()
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost store prints 40 lines of C++ frames a call

import torch  # noqa: E402

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one and warns in every process

from llm_local.train import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
