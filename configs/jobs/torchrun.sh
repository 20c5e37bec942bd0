#!/bin/sh
# One stage of a run as a job of its own, whose ranks torchrun starts again when one dies. The first of three sites:
#   configs/jobs/torchrun.sh CONFIG.yaml --num_stages 3 --run_key_file run.key --stage 0 --send_to siteB:7001
# NPROC_PER_NODE: ranks of the stage, its replicas. A launcher that is gone itself is started by the same command again.
exec torchrun --standalone --nproc_per_node "${NPROC_PER_NODE:-1}" --max_restarts 100 \
  -m llm_local.cli pretrain "$@" --resume_from_checkpoint auto
