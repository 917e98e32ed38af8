"""One step of SGD on eight rows with the divergence and L_D, on as many processes as started: writes the weights."""

import os
import sys
from pathlib import Path

import torch
from test_sft import EDGE, trainer, weights

folder = Path(sys.argv[1])
ranks = int(os.environ.get("WORLD_SIZE", "1"))
section = {"weight_bits": 4, "activation_bits": 32, "distillation": EDGE["distillation"], "distribution": 1.0}
made = trainer(
    folder, section, 8, per_device_train_batch_size=8 // ranks, max_steps=1, optim="sgd", learning_rate=1.0,
    max_grad_norm=0.0,
)  # fmt: skip
made.train()
figures = made.heldout_loss(8, 3)
if made.is_world_process_zero():
    assert figures["tokens"] == sum(sum(label != -100 for label in row["labels"]) for row in made.train_dataset)
    torch.save(weights(made.model), folder / "weights.pt")
