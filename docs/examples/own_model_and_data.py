"""A model and data of one's own, trained in two stages.

    torchrun --nproc_per_node 2 docs/examples/own_model_and_data.py

The model is a config, whose layers each rank makes for itself; the data are rows of text in a data set of `datasets`.
All that pretrain.py takes as a flag is a setting of Config.load by the same name.
"""

import inspect
import json.decoder
import sys
import textwrap

from datasets import Dataset
from transformers import LlamaConfig

import llm_local as ll

FOLDER = sys.argv[1] if len(sys.argv) > 1 else "runs/own-model"

model = LlamaConfig(
    vocab_size=4096,  # the built-in tokenizer's; give a tokenizer of your own as tokenizer=
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=128,
)
sources = [inspect.getsource(module) for module in (textwrap, json.decoder, inspect)]
train = Dataset.from_dict({"text": sources})
held_out = {"json": Dataset.from_dict({"text": [inspect.getsource(json)]})}

config = ll.Config.load(
    num_stages=2,
    seq_length=128,
    per_device_train_batch_size=4,
    max_steps=20,
    learning_rate=3e-3,
    eval_steps=10,
    eval_batches=2,
    output_dir=FOLDER,
    overwrite_output_dir=True,
)
with ll.prepare(config, model, train_dataset=train, eval_dataset=held_out) as run:
    run.train()
    exported = run.export()
    if run.place.rank == 0:
        print(f"load it with AutoModelForCausalLM.from_pretrained({str(exported)!r})")
