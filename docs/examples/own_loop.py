"""A loop of one's own: each step is a call, and so are an evaluation and a checkpoint.

    torchrun --nproc_per_node 2 docs/examples/own_loop.py

Both ranks go through the same steps, each for its own stage: the losses of a step are those of this rank's blocks, and
nobody waits for a later stage before an evaluation. A callback is transformers' own.
"""

import sys
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

import llm_local as ll

FOLDER = sys.argv[1] if len(sys.argv) > 1 else "runs/own-loop"


class Printed(TrainerCallback):
    """On rank 0 a log has the losses of all stages, once the last stage is through with the step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            print(f"step {state.global_step}: {logs['loss_stage_0']:.3f} and {logs['loss_stage_1']:.3f}")


config = ll.Config.load(
    model_type="gpt2",
    config_overrides="n_layer=4,n_embd=64,n_head=4,vocab_size=4096,n_positions=128",
    num_stages=2,
    seq_length=64,
    per_device_train_batch_size=4,
    max_steps=30,
    learning_rate=3e-3,
    eval_batches=2,
    output_dir=FOLDER,
    overwrite_output_dir=True,
)
with ll.prepare(config, callbacks=[Printed, EarlyStoppingCallback(early_stopping_patience=2)]) as run:
    losses = []
    for step in run.steps():
        result = run.train_step()
        losses.append(result.losses[-1].item())
        if step % 10 == 0:
            found = run.evaluate()  # waits for all stages; every rank gets all their losses
            checkpoint = run.save()
            if run.place.rank == 0:
                print(f"step {step}: validation {found['eval_loss']:.3f}, saved {checkpoint}")
    run.export()
assert losses[-1] < losses[0]
