"""The example of `make nightly` on a fortieth of its users and the items that they met: what takes minutes, in one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

HOME = Path(__file__).parents[1]
SETTINGS = "examples/kuairand/quick.toml"
REDUCED = [
    "embedding.behaviour_dim=16",
    "quantizer.codes=16",
    "supervised.translation_epochs=0.01",
    "supervised.alignment_epochs=0.1",
    "supervised.warmup_epochs=0.2",
    "model.hidden_size=32",
    "model.heads=1",
    "model.intermediate_size=32",
    "model.layers=1",
    'grpo.stages=[{name="recent",blocks=["recent"],steps=1,beta=0.2},'
    '{name="all",blocks=["negatives","positives"],steps=1,beta=0.2}]',
    "grpo.group_size=8",
    "grpo.prompts_per_step=8",
    "train.cpus_per_worker=1",
    "generate.beam_width=24",
    "generate.batch_size=16",
    "generate.max_users=40",
    "evaluation.max_anchors=100",
    "evaluation.resamples=20",
    "evaluation.responsiveness_anchors=20",
    "calibration.alpha=0.3",
]


def write_tables(folder: Path) -> None:
    """interactions.parquet and items.parquet."""
    interactions = pq.read_table(HOME / "examples" / "kuairand" / "interactions.parquet")
    number = pc.cast(interactions["user_id"], "int64")
    few = pc.equal(number, pc.multiply(pc.divide(number, 40), 40))
    interactions = interactions.filter(few)
    items = pq.read_table(HOME / "examples" / "kuairand" / "items.parquet")
    met = pc.is_in(items["item_id"], value_set=pc.unique(interactions["item_id"]))
    pq.write_table(interactions, folder / "interactions.parquet")
    pq.write_table(items.filter(met), folder / "items.parquet")


def overrides(root: Path) -> list[str]:
    """Settings for a root beside its tables."""
    tables = [f"{name}.path={root.parent / name}.parquet" for name in ("interactions", "items")]
    return [f"root={root}", *tables, *REDUCED]


def command(root: Path, *start: str) -> list[str]:
    """A command or a job with these settings."""
    return [*start, "--config", SETTINGS, *(part for override in overrides(root) for part in ("--set", override))]


def run(arguments: Sequence[str], **environment: str) -> str:
    """What a command says on its terminal, once it has ended well."""
    done = subprocess.run(
        arguments, cwd=HOME, env=os.environ | environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
