"""Hours and money of a night for many users, on paper: measured shares and seconds times counted operations.

    python benchmarks/paper.py      # reads gpu_h100.json, nightly.json and scale.json; writes benchmarks/paper.json

Assumptions, none of them measured: a GPU reaches with any of these shapes the share of its matrix ceiling that the 0.5B
shape reached in `decoding with verdicts` (prompts of 1,000 tokens, 100 beams, bfloat16, the run beside one training);
as many GPUs are rented as finish in EIGHT_HOURS; prices are PRICES. Of the cores: CPU seconds a user as the largest
size of scale.json has them, with its catalogue of 7,583 items.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_plan import LARGE, LEVELS, Shape

HERE = Path(__file__).parent
SHAPES = (
    Shape("0.6B", "qwen3", 1024, 3072, 28, 16, 8, 128, 151_936),
    LARGE,
    Shape("8B", "qwen3", 4096, 12_288, 36, 32, 8, 128, 151_936),
)
LENGTH, WIDTH = 1000, 100
USERS = (10_000_000, 1_000_000_000)
EIGHT_HOURS = 8.0
PRICES = {"h100_hour": 3.0, "core_hour": 0.05}
"""US dollars; an assumption."""
OF_USERS = ("prompts", "publish")
"""Phases of scale.json whose work is that of the users."""


def main() -> None:
    """Writes the JSON and prints it."""
    gpu = json.loads((HERE / "gpu_h100.json").read_text())["runs"][0]
    cell = next(cell for cell in gpu["cells"] if _is_measured(cell))
    flops = cell["flops_share"] * gpu["ceilings"]["bfloat16"]["flops"]
    kept = json.loads((HERE / "nightly.json").read_text())["real_day"]["share_with_the_same_prompt"]
    night = json.loads((HERE / "scale.json").read_text())["nights"][-1]
    cpu = sum(night["phases"][phase]["cpu_seconds"] for phase in OF_USERS) / night["users"]
    document = {
        "assumed": {"flops_share": cell["flops_share"], "prices": PRICES, "hours": EIGHT_HOURS},
        "share_that_keeps_its_rows": kept,
        "driver_cpu_seconds_a_user": round(cpu, 5),
        "nights": [row(shape, users, flops, kept) for users in USERS for shape in SHAPES],
        "driver": [driver(users, cpu) for users in USERS],
    }
    (HERE / "paper.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


def driver(users: int, cpu_seconds: float) -> dict[str, Any]:
    """What one process does for so many users beside the engines."""
    hours = users * cpu_seconds / 3600
    return {"users": users, "core_hours": round(hours), "dollars": round(hours * PRICES["core_hour"])}


def _is_measured(cell: dict[str, Any]) -> bool:
    wanted: dict[str, Any] = {"model": "0.5B", "dtype": "bfloat16", "work": "decoding with verdicts"}
    wanted |= {"prompt_tokens": LENGTH, "width": WIDTH}
    return all(cell.get(name) == value for name, value in wanted.items())


def row(shape: Shape, users: int, flops_a_second: float, kept: float) -> dict[str, Any]:
    """A night of one model: everybody generated, and only those whose prompt changed."""
    each = shape.prompts(1, LENGTH) + shape.beams(1, LENGTH, WIDTH, LEVELS)
    hours = users * each / flops_a_second / 3600
    return {
        "model": shape.name,
        "users": users,
        "users_a_second_and_gpu": round(flops_a_second / each, 1),
        "gpu_hours": round(hours),
        "gpus_for_eight_hours": -(-hours // EIGHT_HOURS),
        "dollars": round(hours * PRICES["h100_hour"]),
        "dollars_of_changed_users": round(hours * (1 - kept) * PRICES["h100_hour"]),
    }


if __name__ == "__main__":
    main()
