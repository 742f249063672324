"""What an evaluation leaves behind: metrics.json, table.md, and report.html for whoever decides about blocklists.

    write_report(folder_url, Evaluation(about, systems, ours, lines, ...))
    console.print(terminal(systems_table(read_systems(document), document["ours"])))

Invariant: report.html shows nothing that metrics.json or the training's metrics.jsonl does not hold, and loads
nothing from anywhere: one file, pictures and style inside, readable on a phone and on a dark screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from conrec import storage
from conrec.evaluation.document import Evaluation, Figures, System, plain, read_systems
from conrec.report import plots
from conrec.report.drawing import svg, svg_file
from conrec.report.markdown import markdown_report
from conrec.report.page import CAPTIONS, STYLE
from conrec.report.published_tables import has_lists, headline_tables, ours_of, percent, rivals_of
from conrec.report.system_table import comparison_table, difference_table, grid, systems_table
from conrec.report.table import Column, Row, Table, html, number, swatch
from conrec.report.training_plots import training_plots
from conrec.report.words import alpha_words, column_words, odds_words

FHR_TARGET, CATCH_TARGET = 1.15, 1.25
"""How many times a system's FHR at equal FPH, and its catch at 1 % false block, the full method aims at."""

# Written out in the plot of all systems: high on both axes, for it blocks what everybody sees.
_NAMED = ("most shown",)


def write_report(folder_url: str, evaluation: Evaluation) -> None:
    """Writes metrics.json (undefined and infinite figures as null), table.md and report.html into the folder.

    Where lists were published, also published.svg: the picture that opens the report.
    """
    document = evaluation.to_json()
    storage.write_json(storage.join(folder_url, "metrics.json"), document)
    storage.write_bytes(
        storage.join(folder_url, "table.md"), markdown_report(document, read_systems(document)).encode()
    )
    storage.write_bytes(storage.join(folder_url, "report.html"), report_html(evaluation).encode())
    if has_lists(document["published"]):
        picture = plots.published_plot(document["published"], ours_of(document["published"]))
        storage.write_bytes(storage.join(folder_url, "published.svg"), svg_file(picture))


def report_html(evaluation: Evaluation) -> str:
    """The report as one HTML document; a part that the evaluation does not have is left out."""
    document = evaluation.to_json()
    systems, ours = read_systems(document), document["ours"]
    parts = [
        "<h1>Evaluation of the predicted rejections</h1>",
        *_opening(document["published"]),
        _facts(document["about"]),
        *_headline(document),
        "<h2>What is caught, and what it costs</h2>",
        _figure(
            plots.frontier_plot(document["systems"], ours, document["lines"], _NAMED),
            CAPTIONS["frontier"],
            _key(systems, ours),
        ),
        *_comparisons(document["comparisons"]),
    ]
    if document["catch_curves"]:
        parts += [
            "<h2>When hardly any like may be lost</h2>",
            _figure(plots.catch_plot(document["catch_curves"], ours), CAPTIONS["catch"]),
        ]
    parts += ["<h2>All systems</h2>", html(systems_table(systems, ours)), _note(CAPTIONS["systems"])]
    if document["ablation"]:
        steps = [((step["step"], step["against"]), step["differences"]) for step in document["ablation"]]
        parts += [
            "<h2>What each step adds</h2>",
            _figure(plots.ablation_plot(document["ablation"]), CAPTIONS["ablation"]),
            html(difference_table((Column("step", "words"), Column("against", "words")), steps)),
            _note(CAPTIONS["differences"]),
        ]
    if document["differences"]:
        pairs = [((name,), figures) for name, figures in document["differences"].items()]
        table = html(difference_table((Column("of", "words"),), pairs))
        parts += ["<h2>Paired differences</h2>", table, _note(CAPTIONS["differences"])]
    parts += _coverage(document["target_coverage"])
    parts += _responsiveness(document["responsiveness"])
    drawn = training_plots(plain(evaluation.training))
    if drawn or document["forgetting"] or document["verdict_auc"]:
        parts.append("<h2>Training</h2>")
    if document["forgetting"]:
        parts.append(_figure(plots.forgetting_plot(document["forgetting"], ours), CAPTIONS["forgetting"]))
    if document["verdict_auc"]:
        parts.append(_figure(plots.verdict_plot(document["verdict_auc"], ours), CAPTIONS["verdict_auc"]))
    parts += [_figure(figure, CAPTIONS[name]) for name, figure in drawn.items()]
    if document["quality"]:
        parts += ["<h2>Catalogue</h2>", _facts(document["quality"]), _note(CAPTIONS["quality"])]
    head = (
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>conrec evaluation</title>"
        f'<meta name=viewport content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
    )
    return "\n".join([head, *parts, "</body></html>\n"])


def _opening(published: Mapping[str, Any]) -> list[str]:
    """The verdict in words, a table and a picture, and the users who are shown as they would see it."""
    if not has_lists(published):
        return []
    ours = ours_of(published)
    return [
        "<h2>What the lists spare, and what they lose</h2>",
        *(f"<p>{sentence}</p>" for sentence in _promises(published, ours)),
        _spared(published, ours),
        _note(CAPTIONS["verdict"]),
        _figure(plots.published_plot(published, ours), CAPTIONS["published"]),
        *_examples(published),
    ]


def _promises(published: Mapping[str, Any], ours: str) -> list[str]:
    """What the served list does to a hundred rejections and likes, and how it stands beside the others."""
    served = published["systems"][ours]["at_alpha"].get(f"{published['alpha']:g}", {})
    counts = f"{published['pairs']['rejected']:,} rejections and {published['pairs']['liked']:,} likes"
    sentences = [
        f"At {alpha_words(published['alpha'])}, which is served, of 100 coming rejections "
        f"<b>{_hundred(served.get('catch'))} are spared</b>, and of 100 coming likes "
        f"<b>{_hundred(served.get('false_block'))} are lost</b>, measured on {counts} of {published['users']:,} users. "
        "Without a list, none are spared and none lost."
    ]
    for name in rivals_of(published):
        pair = published["against"].get(name, {})
        ratios, differences = pair.get("catch_ratio", {}), pair.get("catch_difference", {})
        if ratios:
            share = min(ratios, key=lambda one: abs(float(one) - published["alpha"]))
            sentences.append(_beside(name, share, ratios[share], differences.get(share, {})))
    return sentences


def _beside(name: str, share: str, ratio: Mapping[str, Any], difference: Mapping[str, Any]) -> str:
    value, low, high = (difference.get(end) for end in ("value", "low", "high"))
    if value is None:
        return f"Beside {escape(name)}: not defined here."
    sure = low is not None and high is not None and (low > 0 or high < 0)
    span = "" if ratio.get("low") is None else f" ({number(ratio['low'])} to {number(ratio['high'])})"
    times = "more" if ratio.get("value") is None else f"{number(ratio['value'])} times{span} as many"
    than = "than" if ratio.get("value") is None else "as"
    chance = "a difference beyond chance" if sure else "a difference that chance may have made"
    return (
        f"When {percent(share)} of likes are lost, our list spares {times} rejections {than} a list by {escape(name)}: "
        f"{chance}."
    )


def _hundred(figure: Mapping[str, Any] | None) -> str:
    """Of a hundred, a share: one decimal below ten."""
    value = (figure or {}).get("value")
    if value is None:
        return "–"
    return f"{100 * value:.0f}" if value >= 0.0995 or value == 0 else f"{100 * value:.1f}"


def _spared(published: Mapping[str, Any], ours: str) -> str:
    """A row an alpha, two columns a system: rejections spared and likes lost, of a hundred."""
    names = [ours, *(name for name in rivals_of(published) if published["systems"][name]["at_alpha"])]
    lines = [
        "<tr><th>" + "".join(f"<th colspan=2>{escape(name)}" for name in names) + "<th colspan=2>no list",
        "<tr><th>of 100" + "<th>spared<th>lost" * (len(names) + 1),
    ]
    for alpha in published["systems"][ours]["at_alpha"]:
        cells = ""
        for name in names:
            lists = published["systems"][name]["at_alpha"].get(alpha, {})
            cells += "".join(_of_hundred(lists.get(measure), name == ours) for measure in ("catch", "false_block"))
        served = " class=served" if float(alpha) == published["alpha"] else ""
        lines.append(f"<tr{served}><td>{alpha_words(alpha)}{cells}<td>0<td>0")
    return f"<div class=wide><table class=verdict>{'</tr>'.join(lines)}</tr></table></div>"


def _of_hundred(figure: Mapping[str, Any] | None, bold: bool) -> str:
    text = f"<b>{_hundred(figure)}</b>" if bold else _hundred(figure)
    ends = [{"value": (figure or {}).get(end)} for end in ("low", "high")]
    if any(end["value"] is None for end in ends):
        return f"<td>{text}"
    return f"<td>{text}<small>{_hundred(ends[0])} to {_hundred(ends[1])}</small>"


def _examples(published: Mapping[str, Any]) -> list[str]:
    users = published.get("examples") or ()
    parts = ["<h2>Three users as they would see it</h2>", _note(CAPTIONS["examples"])] if users else []
    for user in users:
        rejected = ", ".join(f"{one['count']} × {escape(one['words'])}" for one in user["rejected"])
        parts.append(
            f"<h3>{escape(user['kind'].capitalize())}: user {escape(user['user'])}</h3>"
            f"<p>Rejected {user['rejections']:,}, most of all: {rejected}. Blocked by prediction at "
            f"{alpha_words(published['alpha'])}: {user['length']:,} items, the surest first:</p>"
        )
        rows = []
        for item in user["blocked"]:
            why = "; ".join(map(column_words, item["reasons"])) or "nothing above what is usual"
            shown = f"{item['item']}: {item['words']}"
            rows.append(Row((shown, odds_words(item["log_odds"]), why, item["window"])))
        heads = ("item", "odds", "because of", "in the window")
        parts.append(html(Table([Column(head, "words") for head in heads], rows)))
    return parts


def _headline(document: Mapping[str, Any]) -> list[str]:
    """Tables of the published lists, of the fitted score and of its thresholds."""
    parts = []
    for table in headline_tables(document):
        caption = CAPTIONS[table.key].format(reach=f"{document['score'].get('reach', 1):g}")
        parts += [f"<h2>{escape(table.title)}</h2>", html(table), _note(caption)]
    return parts


def _comparisons(comparisons: Mapping[str, Any]) -> list[str]:
    if not comparisons:
        return []
    parts = [f"<h2>At the same harm</h2><p>{_verdict(comparisons, 'difference', 'ratio', FHR_TARGET, 'FHR')}</p>"]
    parts.append(_figure(plots.ratio_plot(comparisons, "ratio", FHR_TARGET), CAPTIONS["ratio"]))
    catches = {name: row for name, row in comparisons.items() if row.get("catch_ratio")}
    if catches:
        verdict = _verdict(catches, "catch_difference", "catch_ratio", CATCH_TARGET, "Catch at 1 % false block")
        parts += [
            f"<p>{verdict}</p>",
            _figure(plots.ratio_plot(catches, "catch_ratio", CATCH_TARGET), CAPTIONS["catch_ratio"]),
        ]
    return [*parts, html(comparison_table(comparisons))]


def _verdict(comparisons: Mapping[str, Any], difference: str, ratio: str, target: float, what: str) -> str:
    """How many of the systems are beaten, in how many cases beyond chance, and in how many by as much as wanted."""
    rows = comparisons.values()
    known = [row[difference] for row in rows if (row.get(difference) or {}).get("value") is not None]
    above = sum(figure["value"] > 0 for figure in known)
    surely = sum((figure.get("low") or 0) > 0 for figure in known)
    # A system that catches nothing has no ratio, and is beaten by more than any factor.
    reached = sum(
        (row.get(ratio) or {}).get("value") is None or row[ratio]["value"] >= target
        for row in rows
        if ((row.get(difference) or {}).get("value") or 0) > 0
    )
    return (
        f"{what} of the full method is above that of <b>{above} of {len(known)}</b> systems, {surely} of them "
        f"beyond chance, {reached} of them {target:g} times or more."
    )


def _coverage(coverage: Mapping[str, Any]) -> list[str]:
    if not coverage:
        return []
    rest = {key: value for key, value in coverage.items() if key != "shares"}
    parts = ["<h2>How far lasting interests reach</h2>", _grid("target", coverage.get("shares", {}))]
    return [*parts, _note(CAPTIONS["coverage"]), _facts(rest)]


def _responsiveness(answers: Mapping[str, Any]) -> list[str]:
    events = {event: answer for event, answer in answers.items() if isinstance(answer, Mapping)}
    if not events:
        return []
    # The groups of items of an event are one level deeper than its own figures.
    groups = {
        event: {name: figures for name, figures in answer.items() if "value" not in figures}
        for event, answer in events.items()
    }
    parts = ["<h2>Does one more event move the list?</h2>"]
    parts.append(_figure(plots.responsiveness_plot(groups), CAPTIONS["responsiveness"]))
    parts.append(_facts({key: value for key, value in answers.items() if key not in events}))
    for event, answer in events.items():
        own = {name: figure for name, figure in answer.items() if "value" in figure}
        parts += [f"<h3>One more item {escape(event)}</h3>", _facts(own), _grid("share of items", groups[event])]
    return parts


def _key(systems: Mapping[str, System], ours: str) -> str:
    """The numbers of the plot in words, by group."""
    lines = []
    for group, title in plots.NAMES.items():
        names = [
            f"<span><i>{place}</i>&nbsp;{f'<b>{escape(name)}</b>' if name == ours else escape(name)}</span>"
            for place, (name, system) in enumerate(systems.items(), 1)
            if system.group == group
        ]
        if names:
            lines.append(f"<p>{swatch(group)}<b>{title}</b><br>{' '.join(names)}")
    return f"<div class=key>{''.join(lines)}</div>"


def _grid(head: str, rows: Mapping[str, Figures]) -> str:
    return html(grid(head, rows)) if rows else ""


def _facts(facts: Mapping[str, Any]) -> str:
    lines = [f"<tr><th>{escape(key)}<td>{escape(value)}" for key, value in _flat(facts)]
    return f"<table class=facts>{'</tr>'.join(lines)}</tr></table>" if lines else ""


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (name, text) pairs; a figure is one fact."""
    pairs = []
    for key, value in facts.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping) and {"value", "low", "high"} == value.keys():
            pairs.append((name, f"{number(value['value'])} ({number(value['low'])} to {number(value['high'])})"))
        elif isinstance(value, Mapping):
            pairs += _flat(value, f"{name}: ")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            pairs.append((name, ", ".join(_text(entry) for entry in value) or "none"))
        else:
            pairs.append((name, _text(value)))
    return pairs


def _text(value: Any) -> str:
    if value is None or isinstance(value, float):
        return f"{value:,.0f}" if value is not None and value.is_integer() else number(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _figure(figure: Figure, caption: str, key: str = "") -> str:
    return f"<figure>{svg(figure)}{key}<figcaption>{escape(caption)}</figcaption></figure>"


def _note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>"
