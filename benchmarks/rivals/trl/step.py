"""Seconds of a step of TRL's `GRPOTrainer`: started by compare.py, with the Python of TRL's own environment.

    PYTHON step.py CHECKPOINT PROMPTS.npy GROUP NEW_TOKENS STEPS LORA_RANK

Random rewards, since what a step costs does not depend on them; beta > 0, one update a rollout, one thread. Prints the
CPU seconds of each step, and the tokens of a prompt as TRL reads it, as JSON on the last line.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):  # type: ignore[misc]
    """CPU seconds of each step: generating, rewards, reference, gradient, optimiser."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self.began)


def main() -> None:
    """Trains for some steps and prints what they took."""
    checkpoint, prompts, (group, new_tokens, steps, rank) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:])
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token, tokenizer.eos_token = tokenizer.convert_ids_to_tokens([0, 1])
    rows = np.load(prompts)
    texts = ["".join(tokenizer.convert_ids_to_tokens(row)) for row in rows.tolist()]
    read = {len(tokenizer(text)["input_ids"]) for text in texts}
    adapters = None
    if rank:
        from peft import LoraConfig

        adapters = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(checkpoint),
            processing_class=tokenizer,
            reward_funcs=lambda completions, **_: [random.random() for _ in completions],
            train_dataset=Dataset.from_dict({"prompt": texts}),
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=len(rows) * group,
                num_generations=group,
                max_completion_length=new_tokens,
                generation_kwargs={"min_new_tokens": new_tokens},
                max_steps=steps,
                beta=0.2,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            callbacks=[clock],
            peft_config=adapters,
        )
        trainer.train()
    print(json.dumps({"seconds": clock.seconds, "prompt_tokens": sorted(read)}))


if __name__ == "__main__":
    main()
