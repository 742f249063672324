"""Caser, BERT4Rec, FDSA and S3-Rec from RecBole 1.2.1 on rejections, through the files of `conrec anchors`.

    python3.11 -m venv /tmp/recbole
    /tmp/recbole/bin/pip install --no-deps -r benchmarks/rivals/recbole/requirements.txt
    .venv/bin/conrec anchors --config examples/movielens/conrec.toml --out runs/anchors
    /tmp/recbole/bin/python benchmarks/rivals/recbole/rival.py FDSA --anchors runs/anchors --out runs/recbole \
        --validation-days 1461
    .venv/bin/conrec evaluate --config examples/movielens/conrec.toml --systems floors \
        --predictions FDSA=runs/recbole/FDSA.parquet

Needs no conrec. RecBole drops what a threshold calls negative, so rejections are its interactions: a model learns which
rejection comes next. FDSA and S3-Rec read the category. Each trial, a width and a learning rate, learns until the
validation time, `--validation-days` before the last event; its best pass by FHR@20 on the windows from there to the cut
is its figure. The best trial learns once more, as many passes, from everything. Writes NAME.parquet (100 items for
every anchor), NAME_candidates.parquet and NAME.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.interaction import Interaction
from recbole.data.utils import get_dataloader
from recbole.utils import get_model, init_seed

MODELS = ("Caser", "BERT4Rec", "FDSA", "S3Rec")
TRIALS = tuple((width, rate) for width in (32, 64) for rate in (1e-3, 3e-3))
"""As many as our own sequential models have."""
PATIENCE = 3
TOP, LISTED = 20, 100
LONGEST = 24
"""Rejections of a history: as many as a prompt of ours holds on KuaiRand."""
DAY = pd.Timedelta(days=1)


@dataclass(frozen=True)
class Fitted:
    """A trained model, and how RecBole numbers its items. `known`: tokens of the items that it learned from."""

    model: Any
    dataset: Any
    known: list[str]

    @torch.no_grad()
    def scores(self, users: list[str], sequences: list[list[str]], items: list[str]) -> np.ndarray:
        """Of items, -inf for those that it does not know. Shape: (A, I) float32."""
        self.model.eval()
        number = self.dataset.field2token_id[self.dataset.iid_field]
        people = self.dataset.field2token_id[self.dataset.uid_field]
        known = set(self.known)
        columns = np.array([number[item] if item in known else 0 for item in items])
        found = np.full((len(users), len(items)), -np.inf, np.float32)
        for first in range(0, len(users), 256):
            block = sequences[first : first + 256]
            rows = [[number[item] for item in sequence if item in known][-LONGEST:] for sequence in block]
            lengths = np.array([len(row) for row in rows])
            ids = np.zeros((len(rows), LONGEST), np.int64)
            for place, row in enumerate(rows):
                ids[place, : len(row)] = row
            asked = Interaction(
                {
                    "item_id_list": torch.from_numpy(ids),
                    "item_length": torch.from_numpy(np.maximum(lengths, 1)),
                    "user_id": torch.tensor([people.get(user, 0) for user in users[first : first + 256]]),
                }
            )
            said = self.model.full_sort_predict(asked).numpy()[:, columns]
            found[first : first + len(block)] = np.where(columns > 0, said, -np.inf)
        return found


def main() -> None:
    """Tunes, learns from everything, and answers."""
    given = arguments()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    events = pd.read_parquet(given.anchors / "events.parquet").sort_values(["user_id", "timestamp"], kind="stable")
    items = pd.read_parquet(given.anchors / "items.parquet")
    cut = pd.read_parquet(given.anchors / "anchors.parquet").anchor_time.min()
    began, trials = time.perf_counter(), []
    earlier = cut - given.validation_days * DAY
    asked = questions(events, earlier, cut, given.horizon_days)
    for width, rate in TRIALS[: given.trials]:
        _, passes, figure = fit(given, events[events.timestamp <= earlier], items, (width, rate), given.epochs, asked)
        trials.append({"width": width, "rate": rate, "passes": passes, "figure": round(figure, 4)})
        print(given.model, trials[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    best = max(trials, key=lambda trial: trial["figure"])
    start = time.perf_counter()
    fitted, _, _ = fit(given, events, items, (int(best["width"]), best["rate"]), int(best["passes"]), None)
    training = time.perf_counter() - start
    start = time.perf_counter()
    anchors = answer(fitted, given)
    log = {
        "trials": trials,
        "chosen": best,
        "validation_anchors": len(asked),
        "training_seconds": round(training, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "parameters": sum(parameter.numel() for parameter in fitted.model.parameters()),
        "users_per_second": round(anchors / (time.perf_counter() - start), 1),
    }
    (given.out / f"{given.model}.json").write_text(json.dumps(log, indent=2) + "\n")


def fit(
    given: argparse.Namespace,
    events: pd.DataFrame,
    items: pd.DataFrame,
    trial: tuple[int, float],
    passes: int,
    asked: pd.DataFrame | None,
) -> tuple[Fitted, int, float]:
    """The model, the passes that made it, and its FHR@20 on what is asked; without that, all passes."""
    rejected = events[events.feedback == "negative"]
    init_seed(given.seed, True)
    with tempfile.TemporaryDirectory() as folder:
        write_atomic(Path(folder), rejected, items)
        config = settings(given.model, folder, *trial, given.seed)
        # Built once: RecBole changes the data set in its place.
        dataset = create_dataset(config).build()[0]
        loader = get_dataloader(config, "train")(config, dataset, None, shuffle=True)
        # A sampler is for losses with negatives; these have none.
        model = get_model(given.model)(config, dataset)
        if given.model == "S3Rec":
            pretrain(model, loader, trial[1], given.epochs)
            torch.save({"state_dict": model.state_dict()}, Path(folder) / "pretrained.pth")
            config["train_stage"], config["pre_model_path"] = "finetune", str(Path(folder) / "pretrained.pth")
            loader = get_dataloader(config, "train")(config, dataset, None, shuffle=True)
            model = get_model(given.model)(config, dataset)
        known = rejected.item_id.unique().tolist()
        fitted = Fitted(model, dataset, known)
        optimiser = torch.optim.Adam(model.parameters(), lr=trial[1])
        best, at = -1.0, passes
        for epoch in range(1, passes + 1):
            learn(model, loader, optimiser)
            if asked is None:
                continue
            figure = hits(fitted, asked)
            if figure > best:
                best, at = figure, epoch
            elif epoch - at >= PATIENCE:
                break
    return fitted, at, best


def pretrain(model: Any, loader: Any, rate: float, passes: int) -> None:
    """The first stage of S3-Rec, on masked items and their categories."""
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(passes):
        learn(model, loader, optimiser)


def learn(model: Any, loader: Any, optimiser: torch.optim.Optimizer) -> None:
    """One pass."""
    model.train()
    unmasked = 0
    for batch in loader:
        optimiser.zero_grad()
        found = model.calculate_loss(batch)
        loss = torch.as_tensor(sum(found) if isinstance(found, tuple) else found)
        if not torch.isfinite(loss):
            # BERT4Rec masks at random: in a last batch of a few rows perhaps nothing, and divides by it.
            unmasked += 1
            if unmasked > 1:
                raise SystemExit("the training has diverged")
            continue
        loss.backward()
        optimiser.step()


def settings(model: str, folder: str, width: int, rate: float, seed: int) -> Config:
    """RecBole's own for the model, but for width, rate and dropout, which half would be too much for."""
    chosen = {
        "data_path": folder,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]},
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "TIME_FIELD": "timestamp",
        "MAX_ITEM_LIST_LENGTH": LONGEST,
        "train_neg_sample_args": None,
        "loss_type": "CE",
        "eval_args": {"split": {"RS": [1.0, 0.0, 0.0]}, "order": "TO", "group_by": None, "mode": "full"},
        "train_batch_size": 256,
        "embedding_size": width,
        "hidden_size": width,
        "inner_size": 2 * width,
        "hidden_dropout_prob": 0.2,
        "attn_dropout_prob": 0.2,
        "learning_rate": rate,
        "seed": seed,
        "use_gpu": False,
        "state": "ERROR",
        "checkpoint_dir": folder,
    }
    # RecBole reads the words of the command line as settings.
    words, sys.argv = sys.argv, sys.argv[:1]
    try:
        return Config(model=model, dataset="data", config_dict=chosen)
    finally:
        sys.argv = words


def write_atomic(folder: Path, rejected: pd.DataFrame, items: pd.DataFrame) -> None:
    """RecBole's files of interactions and items."""
    (folder / "data").mkdir()
    seconds = rejected.timestamp.astype("int64") / 1e6
    table = pd.DataFrame(
        {"user_id:token": rejected.user_id, "item_id:token": rejected.item_id, "timestamp:float": seconds}
    )
    table.to_csv(folder / "data" / "data.inter", sep="\t", index=False)
    known = items[items.item_id.isin(rejected.item_id)]
    words = known.category.fillna("none").str.replace(r"\s+", "_", regex=True).str.replace("|", " ", regex=False)
    table = pd.DataFrame({"item_id:token": known.item_id, "class:token_seq": words})
    table.to_csv(folder / "data" / "data.item", sep="\t", index=False)


def questions(events: pd.DataFrame, earlier: pd.Timestamp, cut: pd.Timestamp, horizon: float) -> pd.DataFrame:
    """Users with a rejection and a like before and a rejection in a window between validation time and cut.

    Columns: user_id, sequence (rejected before, oldest first), met (all before), targets (rejected in the window).
    """
    span = min(pd.Timedelta(days=horizon), cut - earlier)
    found = []
    for start in pd.date_range(earlier, cut - span, freq=span):
        before, window = events[events.timestamp <= start], events[events.timestamp > start]
        window = window[(window.timestamp <= start + span) & (window.feedback == "negative")]
        past = before[before.user_id.isin(window.user_id)].groupby("user_id")
        if not len(past):
            continue
        one = pd.DataFrame(
            {
                "sequence": past.apply(lambda rows: rows.item_id[rows.feedback == "negative"].tolist()),
                "met": past.item_id.agg(set),
                "liked": past.feedback.agg(lambda kinds: (kinds == "positive").any()),
            }
        )
        one["targets"] = window.groupby("user_id").item_id.agg(set)
        found.append(one[(one.sequence.str.len() > 0) & one.liked].reset_index())
    return pd.concat(found, ignore_index=True)


def hits(fitted: Fitted, asked: pd.DataFrame) -> float:
    """FHR@20."""
    items = np.array(fitted.known)
    ranked = best_items(fitted, asked.user_id.tolist(), asked.sequence.tolist(), asked.met.tolist(), TOP)[0]
    return float(
        np.mean([bool(target & set(items[row[row >= 0]])) for row, target in zip(ranked, asked.targets, strict=True)])
    )


def best_items(
    fitted: Fitted, users: list[str], sequences: list[list[str]], met: list[set[str]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the known items that a user has not met, -1 for padding, and their scores. Shape: (A, k) each."""
    scores = fitted.scores(users, sequences, fitted.known)
    place = {item: column for column, item in enumerate(fitted.known)}
    for row, items in enumerate(met):
        scores[row, [place[item] for item in items if item in place]] = -np.inf
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(scores, ranked, axis=1)
    return np.where(np.isfinite(values), ranked, -1), values


def answer(fitted: Fitted, given: argparse.Namespace) -> int:
    """Writes what is answered; returns the number of anchors."""
    parts, chosen = [], []
    candidates = pd.read_parquet(given.anchors / "candidates.parquet").groupby("anchor_time")
    asked = pd.read_parquet(given.anchors / "anchors.parquet")
    items = np.array(fitted.known)
    for moment, anchors in asked.groupby("anchor_time"):
        # Of each anchor nothing but its own history is read.
        name = moment.strftime("%Y-%m-%dT%H-%M-%SZ")
        history = pd.read_parquet(given.anchors / "histories" / f"{name}.parquet")
        history = history[history.user_id.isin(anchors.user_id)].sort_values("timestamp", kind="stable")
        met = history.groupby("user_id").item_id.agg(set)
        sequences = history[history.feedback == "negative"].groupby("user_id").item_id.agg(list)
        users = anchors.user_id.tolist()
        rows = [sequences[user] for user in users]
        ranked, values = best_items(fitted, users, rows, [met[user] for user in users], LISTED)
        user, column = np.nonzero(ranked >= 0)
        columns = {"user_id": np.array(users)[user], "anchor_time": moment, "item_id": items[ranked[user, column]]}
        parts.append(pd.DataFrame(columns | {"score": values[user, column].astype(np.float64)}))
        if moment in candidates.groups:
            table = candidates.get_group(moment).copy()
            every = sorted(table.item_id.unique())
            scores = fitted.scores(users, rows, every)
            place, item = {one: row for row, one in enumerate(users)}, {one: row for row, one in enumerate(every)}
            said = scores[table.user_id.map(place), table.item_id.map(item)].astype(np.float64)
            # An item that nobody rejected before the cut comes last.
            chosen.append(table.assign(score=np.where(np.isfinite(said), said, -1e30)))
    given.out.mkdir(parents=True, exist_ok=True)
    for name, tables in (("", parts), ("_candidates", chosen)):
        table = pd.concat(tables, ignore_index=True)
        table.anchor_time = table.anchor_time.astype("datetime64[us, UTC]")
        table.to_parquet(given.out / f"{given.model}{name}.parquet", index=False)
    return len(asked)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--anchors", type=Path, required=True, help="the folder of conrec anchors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--validation-days", type=float, required=True, help="timeline.validation_days of the settings")
    parser.add_argument("--horizon-days", type=float, default=7.0, help="timeline.horizon_days of the settings")
    parser.add_argument("--trials", type=int, default=len(TRIALS))
    parser.add_argument("--epochs", type=int, default=30, help="passes at most")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
