"""Pretrains a language model on pipeline stages; see README.md, or --help for the flags.

deepspeed --num_gpus N scripts/pretrain.py CONFIG.yaml [--name value ...]      (also torchrun, accelerate launch)
"""

import sys

from llm_local.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
