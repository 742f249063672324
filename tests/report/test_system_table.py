"""One table in three forms, its figures the same in all."""

import io

import pytest
from rich.console import Console

from conrec.evaluation.document import CATCH, COLUMNS, System
from conrec.evaluation.metrics import MEASURES
from conrec.report.system_table import count, difference_table, duration, systems_table
from conrec.report.table import Column, html, markdown, number, terminal


def figures(**values: float | None) -> dict[str, dict[str, float | None]]:
    return {
        measure: {"value": value, "low": value and value * 0.9, "high": value and value * 1.1}
        for measure, value in (dict.fromkeys(MEASURES, 0.1) | values).items()
    }


SYSTEMS = {
    "most <shown>": System("floor", figures(FHR=0.169, FPH=0.159), 3.2, None, 5120.4),
    "a|b": System("sequential", figures(FHR=0.18, Lift=None), 100.0, 498_000, 88.0, "ranked by its second head"),
    "conrec": System(
        "ours",
        figures(FHR=0.215, FPH=0.16) | {CATCH: {"value": 0.05, "low": 0.04, "high": None}},
        9000.0,
        1_320_000,
        8.25,
    ),
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]


def test_markdown_has_every_column_with_intervals_behind_four() -> None:
    lines = markdown(systems_table(SYSTEMS, "conrec")).splitlines()
    header = cells(lines[0])
    assert header == ["system", "group", *COLUMNS, "training", "parameters", "users/s"]
    assert all(len(cells(line)) == len(header) for line in lines[:5])
    shown = dict(zip(header, cells(lines[2]), strict=True))
    assert shown["FHR"] == ".169 [.152, .186]" and shown["HR"] == ".100"
    assert shown["FPH"] == ".159 [.143, .175]" and shown["Lift"] == ".100 [.090, .110]"
    assert shown[CATCH] == shown["choice"] == "–", "not defined"
    assert (shown["training"], shown["parameters"], shown["users/s"]) == ("3 s", "–", "5,120")
    ours = dict(zip(header, cells(lines[4]), strict=True))
    assert ours[CATCH] == ".050", "an interval with one end is none"
    assert (ours["training"], ours["parameters"], ours["users/s"]) == ("2.5 h", "1.3 M", "8.2")
    assert lines[5:] == ["", "- a|b: ranked by its second head"]


def test_html_has_a_line_for_each_group_and_sets_the_best_bold() -> None:
    page = html(systems_table(SYSTEMS, "conrec"))
    assert page.count("class=group") == 3
    assert page.index("floors") < page.index("most &lt;shown&gt;") < page.index("sequential models") < page.index("a|b")
    assert "<td><b>.215</b><small>.194 to .237</small>" in page
    assert "<b>.160</b>" not in page and "<b>.159</b>" not in page, "the least or the most harm is no merit"
    assert page.count("class=ours") == 1 and "<tr class=ours><td>3<td>conrec" in page
    # Long notes stand below the table, where they widen no column.
    assert page.index("</table>") < page.index("<li>a|b: ranked by its second head")
    assert "None" not in page


def test_the_summary_fits_eighty_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal(systems_table({"exposure x rejection rate^2": SYSTEMS["a|b"], **SYSTEMS}, "conrec")))
    lines = console.export_text().splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["system", *MEASURES]
    assert lines[4].split() == ["conrec", ".100", ".215", ".100", ".100", ".100", ".160", ".100"]
    assert lines[1].split()[-1] == "–"


def test_differences_are_signed_and_bold_beyond_chance() -> None:
    sure = {"FHR": {"value": 0.02, "low": 0.01, "high": 0.03}, "FPH": {"value": -0.02, "low": -0.03, "high": -0.01}}
    rows = [(("a < b",), sure), (("c",), {"FHR": {"value": 0.01, "low": -0.01, "high": 0.03}})]
    page = html(difference_table((Column("of", "words"),), rows))
    assert "<td><b>+.020</b><small>+.010 to +.030</small>" in page
    assert "<b>-.020</b>" in page and "<b>+.010</b>" not in page
    assert "a &lt; b" in page
    assert "<th>FHR<th>FPH</tr>" in page, "columns that no row defines are left out"
    assert page.endswith("<small>-.010 to +.030</small><td>–</tr></table></div>")


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0"), (0.0123, ".012"), (-0.5, "-.500"), (1.5, "1.50"), (4380.0, "4,380")]
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text
    assert number(value, signed=True) == ("+" if value is not None and value > 0 else "") + text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (0.31, "0.3 s"), (42, "42 s"), (150, "2 min"), (5 * 3600, "5.0 h")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (940, "940"), (152_400, "152 k"), (999_600, "1.0 M"), (1_320_000, "1.3 M")]
)
def test_counts(value: int | None, text: str) -> None:
    assert count(value) == text
