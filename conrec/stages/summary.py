"""What a person reads at the end of a run: what the lists do, three users, figures, where everything lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from conrec import storage
from conrec.artefact import Artefact
from conrec.config import Config
from conrec.evaluation.document import read_systems
from conrec.progress import console
from conrec.report.published_tables import has_lists, ours_of
from conrec.report.system_table import systems_table
from conrec.report.table import number, terminal
from conrec.report.words import alpha_words
from conrec.serving import versions
from conrec.serving.rows import bucket_path, read_bucket
from conrec.stages.deadline import goes_on
from conrec.stages.inputs import blocklists_url
from conrec.stages.show import Pictures

ROWS_SHOWN = 4
USERS_RANKED = 10_000
"""Among so many of those with predictions, or a bucket more, the users that are shown are chosen."""


def print_summary(config: Config, settings_path: str, made: Mapping[str, Artefact]) -> None:
    """Prints it. `made`: what each stage left; without an evaluation where there was nothing to measure."""
    evaluated = made.get("evaluate")
    metrics = None if evaluated is None else storage.read_json(evaluated.path("metrics.json"))
    if metrics is not None and has_lists(metrics["published"]):
        console.print()
        console.print(published_line(metrics["published"]), style="bold")
    figures = made["nightly"].require()["figures"]
    _print_users(config, figures["version"])
    if metrics is not None:
        _print_evaluation(metrics)
    console.print()
    console.print("Tonight", style="bold")
    if figures["generated"]:
        rate = figures["generated"] / figures["generation_seconds"]
        console.print(
            f"{figures['generated']:,} users generated with {figures['engine']} in "
            f"{figures['generation_seconds']:.0f} s, {rate:.1f} users/s, the start of the engine included"
        )
    if figures["kept"]:
        console.print(f"{figures['kept']:,} users keep what an earlier night generated for them")
    if (left := goes_on(figures)) is not None:
        console.print(left)
    rows = figures["published"]
    console.print(f"{rows['rows']:,} blocked items, {rows['explicit']:,} of them rejected by the user")
    for label, place in (
        ("blocklists", storage.join(blocklists_url(config), "versions", figures["version"])),
        ("report", evaluated.path("report.html") if evaluated else "none: nothing was evaluated"),
        ("plots", made["train"].path("training.png")),
        ("logs", storage.join(config.root, "logs")),
    ):
        console.print(f"{label:<11}{place}", soft_wrap=True)
    console.print()
    console.print("The same on a cluster:")
    for job in ("catalogue", "train", "evaluate", "nightly"):
        console.print(
            f"  ray job submit --working-dir . -- python jobs/{job}.py --config {settings_path}", soft_wrap=True
        )


def published_line(published: Mapping[str, Any]) -> str:
    """What the lists do at the alpha that is served: `published: alpha .05, catch .152, false block .041, ...`."""
    lists = published["systems"][ours_of(published)]["at_alpha"][f"{published['alpha']:g}"]
    measures = {"catch": "catch", "false block": "false_block", "selectivity": "selectivity"}
    figures = ", ".join(f"{word} {number(lists[measure]['value'])}" for word, measure in measures.items())
    return f"published: {alpha_words(published['alpha'])}, {figures}"


def _print_evaluation(metrics: Mapping[str, Any]) -> None:
    """The table of figures, and what GRPO changed."""
    console.print()
    console.print(
        f"Evaluation at {metrics['about']['cut']}, {metrics['about']['anchors']:,} users, K = 20", style="bold"
    )
    console.print(terminal(systems_table(read_systems(metrics), metrics["ours"])))
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


def _print_users(config: Config, version: str) -> None:
    """What three users rejected, and what is blocked for them and why."""
    users = _examples(config, version)
    pictures = Pictures.load(config, users, version)
    for user in users:
        console.print()
        pictures.show(user, ROWS_SHOWN)


def _examples(config: Config, version: str) -> list[str]:
    """Three users with predictions: a sure one, a middling one and an unsure one, by their largest score.

    A bucket is held at a time. Raises `ArtefactError` where the version is missing or damaged.
    """
    root = blocklists_url(config)
    manifest, _ = versions.complete_manifest(root, version)
    best: list[pa.Table] = []
    for bucket in range(manifest["buckets"]):
        rows = read_bucket(root, manifest, bucket_path("data", bucket), "data")
        predicted = rows.filter(pc.equal(rows["reason"], "predicted"))
        best.append(predicted.group_by("user_id").aggregate([("score", "max")]))
        if sum(map(len, best)) >= USERS_RANKED:
            break
    ranked = pa.concat_tables(best).sort_by([("score_max", "descending"), ("user_id", "ascending")])
    users = ranked["user_id"]
    places = {round(share * (len(users) - 1)): None for share in (0.1, 0.5, 0.9)} if len(users) else {}
    return [users[place].as_py() for place in places]
