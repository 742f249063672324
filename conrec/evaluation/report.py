"""What an evaluation leaves behind: metrics.json, and report.html for whoever decides about blocklists.

    write_report(folder_url, Evaluation(about, systems, ours, frontiers, ...))
    console.print(summary_table(systems, ours))

Invariant: report.html shows nothing that metrics.json or the training's metrics.jsonl does not hold, and loads
nothing from anywhere: one file, pictures and style inside, readable on a phone and on a dark screen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from conrec import storage
from conrec.evaluation import plots
from conrec.evaluation.metrics import MEASURES

_BOLD = tuple(measure for measure in MEASURES if measure != "FPH")
"""Measures whose best value is set bold. Not FPH: a list of random items harms least."""

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --quiet: #767676; --ours: #d55e0022; --page: #fff; }
@media (prefers-color-scheme: dark) { :root { --quiet: #a0a0a0; --page: #16181b; } }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--page); line-height: 1.5;
       font-family: system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; } figcaption, .note { color: var(--quiet); font-size: .9rem; max-width: 44rem; }
svg { width: 100%; max-width: 40rem; height: auto; display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2), .facts th, .facts td { text-align: left; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
.systems td:nth-child(2), .systems th:nth-child(2) { position: sticky; left: 0; background: var(--page);
       white-space: normal; min-width: 8rem; }
td small { display: block; color: var(--quiet); font-size: .72rem; } tr.ours { background: var(--ours); }
.systems tr.ours td:nth-child(2) { font-weight: 600; }
"""


@dataclass(frozen=True)
class Evaluation:
    """Everything a report says. All values are plain: what metrics.json holds."""

    about: Mapping[str, Any]
    """Facts above the table: cut, anchors, users, K, what is excluded, ..."""
    systems: Mapping[str, plots.Figures]
    """System -> measure -> value, low, high, in the order of the table."""
    ours: Sequence[str] = ()
    """The systems among them that are this project's."""
    frontiers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Lines of the plot: systems in the order of what they trade; `baselines.EXPOSURE_LINE` is one."""
    differences: Mapping[str, plots.Figures] = field(default_factory=dict)
    """Paired differences, by a name that says of what: `after GRPO - before GRPO`."""
    quality: Mapping[str, Any] = field(default_factory=dict)
    """quality.json of the catalogue."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """The calibration of theta: alpha, overall, strata."""
    curve: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """`theta`, `false_block` and `catch` on the evaluation anchors."""
    training: plots.Rows = ()
    """Rows of the training's metrics.jsonl; drawn, and not copied into metrics.json."""


def write_report(folder_url: str, evaluation: Evaluation) -> None:
    """Writes metrics.json (undefined and infinite figures as null) and report.html into the folder."""
    document = {
        "about": evaluation.about,
        "systems": {
            name: {"ours": name in evaluation.ours, "figures": figures} for name, figures in evaluation.systems.items()
        },
        "frontiers": evaluation.frontiers,
        "differences": evaluation.differences,
        "calibration": evaluation.calibration,
        "curve": evaluation.curve,
        "quality": evaluation.quality,
    }
    storage.write_json(storage.join(folder_url, "metrics.json"), _plain(document))
    storage.write_bytes(storage.join(folder_url, "report.html"), report_html(evaluation).encode())


def report_html(evaluation: Evaluation) -> str:
    """The report as one HTML document."""
    systems, differences = _plain(evaluation.systems), _plain(evaluation.differences)
    parts = [
        "<h1>Evaluation of the predicted rejections</h1>",
        _facts(evaluation.about),
        "<h2>Systems</h2>",
        _systems_table(systems, evaluation.ours, bold=True),
        "<p class=note>Under each figure its 95 % bootstrap interval by user. Bold: the best of the column. "
        "FHR is the share of lists that catch something the user rejects later, FPH the share that hold something "
        "the user likes later: the harm. Read them together: what everybody is shown has a high FHR and a high FPH. "
        "Lift is FHR / FPH; a list that hits next to nothing can have a high one.</p>",
        "<h2>What is caught, and what it costs</h2>",
        _figure(
            plots.frontier_plot(systems, evaluation.ours, evaluation.frontiers),
            "Up and to the left is better: more rejections caught, fewer likes lost. Numbers are those of the "
            "table, crosses are 95 % intervals. A line joins the settings of one system that trades one for the "
            "other; a system is better than another where its line lies above.",
        ),
    ]
    if differences:
        parts += [
            "<h2>Paired differences</h2>",
            _systems_table(differences, (), bold=False),
            "<p class=note>On the same resamples of users. An interval without 0 is a difference beyond chance.</p>",
        ]
    captions = {
        "supervised": "Supervised training. The loss falls within each phase and jumps where another task begins; "
        "accuracy on held-out alignment questions that falls in a later phase is forgetting.",
        "grpo": "Progressive GRPO. A rising reward is only progress where validation FHR stays and FPH falls. "
        "KL shows how far the policy has moved; entropy that collapses, or one ID in most groups, "
        "means that the reward is being farmed. Dotted lines are the borders of stages.",
    }
    drawn = plots.training_plots(_plain(evaluation.training))
    if drawn:
        parts += ["<h2>Training</h2>", *(_figure(figure, captions[name]) for name, figure in drawn.items())]
    if evaluation.calibration:
        parts += ["<h2>theta</h2>", *_theta(_plain(evaluation.calibration), _plain(evaluation.curve))]
    if evaluation.quality:
        parts += [
            "<h2>Catalogue</h2>",
            _facts(evaluation.quality),
            "<p class=note>Few codes used, a high collision rate or neighbours lost by quantisation limit what any "
            "policy over these semantic IDs can tell apart.</p>",
        ]
    head = (
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>conrec evaluation</title>"
        f'<meta name=viewport content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
    )
    return "\n".join([head, *parts, "</body></html>\n"])


def summary_table(systems: Mapping[str, plots.Figures], ours: Sequence[str] = ()) -> Table:
    """The figures without intervals for a terminal of 80 columns; ours in bold."""
    table = Table("system", box=None, pad_edge=False, header_style="dim")
    for measure in MEASURES:
        table.add_column(measure, justify="right", no_wrap=True)
    for name, figures in _plain(systems).items():
        cells = [_number(figures.get(measure, {}).get("value")) for measure in MEASURES]
        table.add_row(name, *cells, style="bold" if name in ours else "")
    return table


def _theta(calibration: Mapping[str, Any], curve: Mapping[str, Any]) -> list[str]:
    overall, alpha = calibration["overall"], calibration["alpha"]
    parts = []
    if curve:
        parts.append(
            _figure(
                plots.calibration_plot(curve, overall["theta"], alpha),
                "Items at least as similar as theta to a generated ID are blocked. The calibrated theta is the "
                f"smallest whose share of blocked future likes stays below alpha = {alpha:g} on held-out anchors; at "
                "the dashed line the false-block curve should meet the dotted one; catch is what that promise leaves.",
            )
        )
    if overall["theta"] is None:
        parts.append(
            "<p class=note>No theta keeps the promise on the calibration anchors: too few of them, or liked items that "
            "share the very semantic ID that was generated. Nothing but explicit rejections is blocked there.</p>"
        )
    header = "<tr><th>rejections in the history<th>anchors<th>theta<th>false block</tr>"
    rows = []
    for label, stratum in [("all", overall), *((None, stratum) for stratum in calibration["strata"])]:
        top = stratum["max_rejections"]
        span = label or (
            f"{stratum['min_rejections']} or more" if top is None else f"{stratum['min_rejections']}-{top}"
        )
        cells = (stratum["anchors"], _number(stratum["theta"]), _number(stratum["false_block"]))
        rows.append(f"<tr><td>{span}" + "".join(f"<td>{cell}" for cell in cells) + "</tr>")
    return [*parts, f"<div class=wide><table>{header}{''.join(rows)}</table></div>"]


def _systems_table(systems: Mapping[str, plots.Figures], ours: Sequence[str], bold: bool) -> str:
    best = {}
    for measure in _BOLD if bold else ():
        values = [figures.get(measure, {}).get("value") for figures in systems.values()]
        best[measure] = max((value for value in values if value is not None), default=None)
    lines = ["<tr><th>#<th>system" + "".join(f"<th>{measure}" for measure in MEASURES) + "</tr>"]
    for place, (name, figures) in enumerate(systems.items(), 1):
        cells = []
        for measure in MEASURES:
            figure = figures.get(measure, {})
            value = _number(figure.get("value"))
            if figure.get("value") is not None and figure.get("value") == best.get(measure):
                value = f"<b>{value}</b>"
            interval = f"{_number(figure.get('low'))} to {_number(figure.get('high'))}"
            cells.append(f"<td>{value}<small>{interval}</small>")
        style = " class=ours" if name in ours else ""
        lines.append(f"<tr{style}><td>{place}<td>{escape(name)}{''.join(cells)}</tr>")
    return f"<div class=wide><table class=systems>{''.join(lines)}</table></div>"


def _facts(facts: Mapping[str, Any]) -> str:
    lines = "".join(f"<tr><th>{escape(key)}<td>{escape(value)}</tr>" for key, value in _flat(facts))
    return f"<div class=wide><table class=facts>{lines}</table></div>"


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (name, text) pairs."""
    pairs = []
    for key, value in facts.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{name}: ")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            pairs.append((name, ", ".join(_text(entry) for entry in value)))
        else:
            pairs.append((name, _text(value)))
    return pairs


def _text(value: Any) -> str:
    if isinstance(value, float):
        return _number(_plain(value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _number(value: float | None) -> str:
    """Three decimals below one, where shares lie, fewer above; a dash for what is undefined."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1:
        return f"{value:.3f}".replace("0.", ".", 1)
    return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"


def _figure(figure: Figure, caption: str) -> str:
    return f"<figure>{plots.svg(figure)}<figcaption>{escape(caption)}</figcaption></figure>"


def _plain(value: Any) -> Any:
    """The same with NaN and infinities as None, which JSON has no other word for, and numpy numbers as Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
