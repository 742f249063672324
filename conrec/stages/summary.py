"""What a person reads at the end of a run: figures beside the floors, three users, where everything lies."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow.compute as pc

from conrec import storage
from conrec.config import Config
from conrec.evaluation.report import read_systems, summary_table
from conrec.progress import console
from conrec.stages.evaluate import evaluate_artefact
from conrec.stages.inputs import blocklists_url, train_artefact
from conrec.stages.nightly import nightly_artefact
from conrec.stages.show import Pictures

ROWS_SHOWN = 4


def print_summary(config: Config, settings_path: str) -> None:
    """Prints it. Every stage must be complete, but the evaluation: where there was nothing to measure there is none."""
    evaluated = evaluate_artefact(config).read() is not None
    if evaluated:
        _print_evaluation(config)
    _print_users(config)
    night = nightly_artefact(config).require()["figures"]
    console.print()
    console.print("Tonight", style="bold")
    if night["generated_now"]:
        rate = night["generated_now"] / night["generation_seconds"]
        console.print(
            f"{night['generated_now']:,} users generated with {night['engine']} in "
            f"{night['generation_seconds']:.0f} s, {rate:.1f} users/s, the start of the engine included"
        )
    rows = night["published"]
    console.print(f"{rows['rows']:,} blocked items, {rows['explicit']:,} of them rejected by the user")
    for label, place in (
        ("blocklists", storage.join(blocklists_url(config), "versions", night["version"])),
        ("report", evaluate_artefact(config).path("report.html") if evaluated else "none: nothing was evaluated"),
        ("plots", train_artefact(config).path("training.png")),
        ("logs", storage.join(config.root, "logs")),
    ):
        console.print(f"{label:<11}{place}", soft_wrap=True)
    console.print()
    console.print("The same on a cluster:")
    for job in ("catalogue", "train", "evaluate", "nightly"):
        console.print(
            f"  ray job submit --working-dir . -- python jobs/{job}.py --config {settings_path}", soft_wrap=True
        )


def _print_evaluation(config: Config) -> None:
    """The table of figures, and what GRPO changed."""
    metrics = storage.read_json(evaluate_artefact(config).path("metrics.json"))
    console.print()
    console.print(
        f"Evaluation at {metrics['about']['cut']}, {metrics['about']['anchors']:,} users, K = 20", style="bold"
    )
    console.print(summary_table(read_systems(metrics), metrics["ours"]))
    for name, difference in metrics["differences"].items():
        console.print(f"{name}: {_difference(difference, 'Lift', 3)}, {_difference(difference, 'FHR', 4)}")
    console.print(
        "FHR: a future rejection among 20; FPH: a future like among them, the harm; Lift = FHR / FPH.", style="dim"
    )


def _difference(figures: Mapping[str, Mapping[str, float | None]], measure: str, places: int) -> str:
    """`FHR +0.0016 [-0.0039, +0.0071]`; a dash for what is undefined."""
    value, low, high = (
        "–" if figures[measure][end] is None else f"{figures[measure][end]:+.{places}f}"
        for end in ("value", "low", "high")
    )
    return f"{measure} {value} [{low}, {high}]"


def _print_users(config: Config) -> None:
    """What three users rejected, and what is blocked for them and why."""
    pictures = Pictures.load(config)
    for user in _examples(config):
        console.print()
        pictures.show(user, ROWS_SHOWN)


def _examples(config: Config) -> list[str]:
    """Three users with predictions: a sure one, a middling one and an unsure one, by their largest score."""
    version = nightly_artefact(config).require()["figures"]["version"]
    table = storage.read_table(storage.join(blocklists_url(config), "versions", version, "data"))
    predicted = table.filter(pc.equal(table["reason"], "predicted"))
    best = predicted.group_by("user_id").aggregate([("score", "max")])
    users = best.sort_by([("score_max", "descending"), ("user_id", "ascending")])["user_id"]
    places = {round(share * (len(users) - 1)): None for share in (0.1, 0.5, 0.9)} if len(users) else {}
    return [users[place].as_py() for place in places]
