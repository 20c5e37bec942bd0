#!/bin/bash
# One stage of a run as a job of its own under SLURM, which puts it back into the queue when its node fails or its time is
# over. The second of three sites, four ranks on one node:
#   sbatch --ntasks-per-node 4 configs/jobs/slurm.sh CONFIG.yaml --num_stages 3 --run_key_file run.key \
#     --stage 1 --receive_on 0.0.0.0:7001 --send_to siteC:7001
# The stage before names the node that the stage runs on (--nodelist keeps it there), or a name that follows it.
#SBATCH --job-name=llm_local
#SBATCH --nodes=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
srun --kill-on-bad-exit=1 python -m llm_local.cli pretrain "$@" --resume_from_checkpoint auto
status=$?
# saved and left on a signal (143), or failed (1): once more; 0 is the end, 2 a configuration that is refused
if [ "$status" -ne 0 ] && [ "$status" -ne 2 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
