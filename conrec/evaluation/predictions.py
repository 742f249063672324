"""Systems from outside: what an evaluation lets them see and asks of them, and the reading of what they answer.

    for name, table in task.tables().items(): ...          # what `conrec anchors` writes
    answer = read_predictions("ranked.parquet", task, excluded, k=100)

An answer ranks items for every anchor that is measured, or scores every pair of an anchor and an item that its user met
first in the window and then rejected or liked, or every candidate among which an anchor's next rejection hides: a file
whose rows are all pairs is the second, one whose rows are all candidates the third, any other the first.

Invariant: no table of a task holds an outcome of what it asks; that of candidates asks which of them is rejected, and
so tells of lists and pairs. Events end at the cut, the histories of a moment at that moment in a table of their own,
since they tell what earlier anchors ask, and pairs stand in the order of users and items. Answers are files of other
people: what does not fit the task is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec import ragged
from conrec.errors import ConfigError, DataError
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import Events
from conrec.feedback.files import holds_nothing, input_files, read_file
from conrec.ragged import Ragged, pairs, ranges
from conrec.tables import ANCHORS, HISTORIES, INTERACTIONS, KINDS, PAIRS, PREDICTIONS, check

ITEM_COLUMNS = ("item_id", "text", "category")
"""What is told of an item."""

FOLDER = "histories"
"""Where the histories lie, a file for each moment of anchors."""

# A letter first, and nothing that a plot, a table or a page would read as more than text.
_NAME = re.compile(r"[A-Za-z][\w .+()-]{0,39}")


@dataclass(frozen=True)
class Task:
    """What an evaluation asks of every system.

    Shape: items I rows, ascending by id; A anchors, of which `measured` (A,) bool are to be ranked for; pair_anchors
    (N,) positions of anchors and pair_items (N,) item rows, distinct pairs; candidates (A, C) int32 item rows of a
    question each, -1 behind them where there are fewer.
    """

    events: Events
    items: pa.Table
    anchors: Anchors
    measured: np.ndarray
    pair_anchors: np.ndarray
    pair_items: np.ndarray
    candidates: np.ndarray
    cut_us: int

    def tables(self) -> dict[str, pa.Table]:
        """Name -> table of everything that a system may see, and of what it must answer: `anchors` and `pairs`."""
        past, anchors = self.events.before(self.cut_us), self.anchors
        described = [name for name in ITEM_COLUMNS if name in self.items.column_names]
        return {
            "events": _table(INTERACTIONS, self._users(past.rows), *_said(past, slice(None), self.item_ids)),
            "items": self.items.select(described),
            "anchors": _table(ANCHORS, *self._named(np.flatnonzero(self.measured))),
            "candidates": self._asked(*self.questions),
            "pairs": self._asked(self.pair_anchors, self.pair_items),
        } | {f"{FOLDER}/{_moment(time).replace(':', '-')}": self._histories(time) for time in np.unique(anchors.times)}

    @cached_property
    def asked(self) -> np.ndarray:
        """The candidates of the measured anchors. Shape: (A, C) bool."""
        return self.measured[:, None] & (self.candidates >= 0)

    @property
    def questions(self) -> tuple[np.ndarray, np.ndarray]:
        """Anchors (M,) and item rows (M,) of these."""
        return np.nonzero(self.asked)[0], self.candidates[self.asked]

    @property
    def later(self) -> int:
        """How many of the measured anchors lie after the cut."""
        return int(np.count_nonzero(self.anchors.times[self.measured] > self.cut_us))

    @cached_property
    def item_ids(self) -> pa.Array:
        """Shape: (I,) string."""
        return self.items["item_id"].combine_chunks()

    def told(self, anchor: int, item: int | None = None) -> str:
        """An anchor in words, and an item."""
        user = self.events.users[int(self.anchors.users[anchor])].as_py()
        named = "" if item is None else f", item {self.item_ids[int(item)].as_py()!r}"
        return f"user {user!r} at {_moment(self.anchors.times[anchor])}{named}"

    def anchors_of(self, users: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Position of the anchor of each user row and time, -1 where there is none. Shape: (N,) each -> (N,) int64."""
        moments, known = np.unique(self.anchors.times, return_inverse=True)
        keys = pairs(self.anchors.users, known, len(moments))
        order = np.argsort(keys)
        moment = np.minimum(np.searchsorted(moments, times), len(moments) - 1)
        sought = pairs(users, moment, len(moments))
        place = order[np.minimum(np.searchsorted(keys, sought, sorter=order), len(keys) - 1)]
        return np.where((keys[place] == sought) & (moments[moment] == times), place, -1)

    def _asked(self, anchors: np.ndarray, items: np.ndarray) -> pa.Table:
        """Pairs of anchors and items, in an order that tells nothing of them."""
        order = np.lexsort((items, self.anchors.times[anchors], self.anchors.users[anchors]))
        return _table(PAIRS, *self._named(anchors[order]), self.item_ids.take(pa.array(items[order])))

    def _histories(self, time_us: int) -> pa.Table:
        """Of the anchors at a moment."""
        at = np.flatnonzero(self.anchors.times == time_us)
        starts = self.anchors.starts[at]
        lengths = self.anchors.ends[at] - starts
        said = _said(self.events, ranges(starts, lengths), self.item_ids)
        return _table(HISTORIES, *self._named(np.repeat(at, lengths)), *said)

    def _users(self, rows: np.ndarray) -> pa.Array:
        return self.events.users.take(pa.array(rows))

    def _named(self, anchors: np.ndarray) -> tuple[pa.Array, pa.Array]:
        return self._users(self.anchors.users[anchors]), pa.array(self.anchors.times[anchors])


@dataclass(frozen=True)
class Ranked:
    """Lists of items for the anchors.

    Shape: items (A, k) int32 item rows, best first, -1 padding; scores (A, k) float32, -inf there.
    """

    items: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class PairScores:
    """Scores (N,) float64 of the pairs of a task, in its order: higher, rather rejected."""

    scores: np.ndarray


@dataclass(frozen=True)
class Choices:
    """Scores (A, C) float32 of the candidates of a task, NaN where nothing is asked: highest, the one rejected."""

    scores: np.ndarray


def named_files(given: Sequence[str]) -> dict[str, str]:
    """`name=file` of each system as name -> file. Raises `ConfigError` for another form, or a name given twice."""
    found: dict[str, str] = {}
    for one in given:
        name, equals, url = one.partition("=")
        if not equals or not url:
            raise ConfigError(f"--predictions {one}: write NAME=FILE, for example --predictions mine=ranked.parquet")
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"--predictions {one}: {name!r} is no name for a row of a table; write a letter first, then letters, "
                "digits, spaces or any of . _ + - ( ), 40 in all at most"
            )
        if name in found:
            raise ConfigError(f"--predictions {one}: {name!r} is given twice; write another name")
        found[name] = url
    return found


def check_names(names: Iterable[str], taken: Collection[str]) -> None:
    """Raises `ConfigError` for a name that is one of `taken`, or begins as the names of our own systems do."""
    for name in names:
        if name in taken or name.startswith("CoNRec"):
            raise ConfigError(f"--predictions {name}=...: a system of ours has this name; write another one")


def read_predictions(url: str, task: Task, excluded: Ragged, k: int) -> Ranked | PairScores | Choices:
    """What a system from outside answers: the k best items of each anchor that are not excluded, or scores of pairs or
    of candidates.

    Of equal scores the smaller item_id comes first. Shape: excluded A rows of item rows.
    Raises `DataError` for what breaks the schema, users, items and anchors that are not asked about, scores that are
    no numbers, an item that is answered twice, and for an anchor, a pair or a candidate without an answer.
    """
    table = _read(url)
    anchors, items = _places(table, task, url)
    scores = table["score"].to_numpy()
    _refuse(
        ~(np.abs(scores) <= np.finfo(np.float32).max),
        lambda row: f"{url}: column score holds {scores[row]} for {task.told(anchors[row], items[row])}",
        "write finite numbers below 3e38",
    )
    width = len(task.items)
    keys = pairs(anchors, items, width)
    order = np.argsort(keys, kind="stable")
    _refuse(
        np.concatenate((np.diff(keys[order]) == 0, [False])),
        lambda row: f"{url}: {task.told(anchors[order[row]], items[order[row]])} has more than one row",
        "keep one row for each user_id, anchor_time and item_id",
    )
    is_pair = np.isin(keys, pairs(task.pair_anchors, task.pair_items, width))
    if is_pair.all():
        told = task.pair_anchors, task.pair_items
        return PairScores(_in_order(url, task, keys[order], scores[order], told, "pairs"))
    if np.isin(keys, pairs(*task.questions, width)).all():
        chosen = np.full(task.candidates.shape, np.nan, np.float32)
        chosen[task.asked] = _in_order(url, task, keys[order], scores[order], task.questions, "candidates")
        return Choices(chosen)
    _refuse_missing(url, task, anchors, is_pair, items)
    kept = ~np.isin(keys, pairs(excluded.rows, excluded.values, width))
    return _best(anchors[kept], items[kept], scores[kept], len(task.anchors), k)


def _read(url: str) -> pa.Table:
    """The files as one table with the columns of PREDICTIONS."""
    types = {field.name: field.type for field in PREDICTIONS}
    tables = []
    for file in input_files(url, types):
        table = read_file(file, types)
        if holds_nothing(table):
            continue
        missing = [name for name in PREDICTIONS.names if name not in table.column_names]
        if missing:
            raise DataError(
                f"{file.url}: column {missing[0]} is missing; the file has {', '.join(table.column_names) or 'none'}. "
                f"Predictions have {', '.join(PREDICTIONS.names)}"
            )
        tables.append(check(table, PREDICTIONS, file.url).select(PREDICTIONS.names))
    if not any(map(len, tables)):
        raise DataError(f"{url}: the file has no rows; write one for each item that is ranked, or for each pair")
    return pa.concat_tables(tables)


def _places(table: pa.Table, task: Task, url: str) -> tuple[np.ndarray, np.ndarray]:
    """Anchor and item of each row, (N,) int64 each."""
    users, items = (
        pc.fill_null(pc.index_in(table[column], value_set=values), -1).to_numpy().astype(np.int64)
        for column, values in (("user_id", task.events.users), ("item_id", task.item_ids))
    )
    for column, found, what in (("user_id", users, "user of the log"), ("item_id", items, "item of items.parquet")):
        _refuse(
            found < 0,
            lambda row, column=column, what=what: (  # type: ignore[misc]
                f"{url}: column {column} holds {table[column][row].as_py()!r}, which is no {what}"
            ),
            f"write {column} as it stands in the files of conrec anchors, or drop these rows",
        )
    anchors = task.anchors_of(users, table["anchor_time"].cast(pa.int64()).to_numpy())
    _refuse(
        anchors < 0,
        lambda row: (
            f"{url}: user {table['user_id'][row].as_py()!r} has no anchor at column anchor_time = "
            f"{_moment(table['anchor_time'][row].value)}"
        ),
        "answer the anchors that conrec anchors writes with these settings, and drop these rows",
    )
    return anchors, items


def _in_order(
    url: str,
    task: Task,
    keys: np.ndarray,
    scores: np.ndarray,
    asked: tuple[np.ndarray, np.ndarray],
    what: str,
) -> np.ndarray:
    """Scores in the order of the anchors and items that are asked; keys ascend and each is one of theirs."""
    anchors, items = asked
    sought = pairs(anchors, items, len(task.items))
    place = np.minimum(np.searchsorted(keys, sought), len(keys) - 1)
    _refuse(
        keys[place] != sought,
        lambda row: f"{url}: no score for {task.told(anchors[row], items[row])}",
        f"score all {len(sought):,} {what} of {what}.parquet, which conrec anchors writes; or, if these are to be "
        f"lists: all their rows are {what}, so rank more items",
    )
    return scores[place]


def _refuse_missing(url: str, task: Task, anchors: np.ndarray, is_pair: np.ndarray, items: np.ndarray) -> None:
    """Where a measured anchor has no row. Shape: (N,) each."""
    remedy = f"rank items for all {np.count_nonzero(task.measured):,} anchors of anchors.parquet"
    if is_pair.any():
        first = int(np.argmin(is_pair))
        remedy += f"; or, if these are to be scores of pairs: {task.told(anchors[first], items[first])} is none"
    missing = task.measured & (np.bincount(anchors, minlength=len(task.anchors)) == 0)
    _refuse(missing, lambda anchor: f"{url}: no row for {task.told(anchor)}", remedy)


def _best(anchors: np.ndarray, items: np.ndarray, scores: np.ndarray, count: int, k: int) -> Ranked:
    """The k items of highest score of each of `count` anchors."""
    order = np.lexsort((items, -scores, anchors))
    anchors, items, scores = anchors[order], items[order], scores[order]
    place = ragged.places(np.bincount(anchors))
    first = place < k
    ranked = Ranked(np.full((count, k), -1, np.int32), np.full((count, k), -np.inf, np.float32))
    ranked.items[anchors[first], place[first]] = items[first]
    ranked.scores[anchors[first], place[first]] = scores[first]
    return ranked


def _refuse(wrong: np.ndarray, told: Callable[[int], str], remedy: str) -> None:
    """Raises `DataError` with what is told of the first place where `wrong` (N,) is true, if there is one."""
    if wrong.any():
        more = np.count_nonzero(wrong) - 1
        also = f", as {more:,} more" if more else ""
        raise DataError(f"{told(int(np.argmax(wrong)))}{also}; {remedy}")


def _moment(time_us: int) -> str:
    """`2026-01-31T18:00:00Z`."""
    return datetime.fromtimestamp(int(time_us) / 1e6, UTC).isoformat().replace("+00:00", "Z")


def _said(events: Events, places: np.ndarray | slice, item_ids: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Item, time and feedback of events."""
    items, kinds = pa.array(events.items[places]), pa.array(events.kinds[places])
    return item_ids.take(items), pa.array(events.times[places]), pa.array(KINDS).take(kinds)


def _table(schema: pa.Schema, *columns: pa.Array) -> pa.Table:
    return pa.table([column.cast(field.type) for field, column in zip(schema, columns, strict=True)], schema)
