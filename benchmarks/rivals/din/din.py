"""DIN (Zhou et al., KDD 2018) of torch-rechub on the pairs of the boosted trees, in an environment of its own.

    python -m venv /tmp/din && /tmp/din/bin/pip install -r benchmarks/rivals/din/requirements.txt
    /tmp/din/bin/python benchmarks/rivals/din/din.py --pairs runs/anchors --seed 0

Reads what `conrec anchors` and benchmarks/rivals/pairs.py wrote: the item and its category attend to the latest
rejections and likes of the user, and beside them stand the columns that the trees read, in bins of equal size, since
the library's DIN takes no plain numbers. Tries as many settings as the sequential models have, on the users that the
trees are chosen on; passes end where the held-out area stops rising. Leaves `told/DIN.parquet` for `conrec evaluate
--predictions` and `told/DIN.json`. One thread; the library's model, a loop of our own.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as parquet
import torch
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.ranking import DIN

sys.path.insert(0, str(Path(__file__).parents[1]))

from given import Given, area, latest_items, places, tuned


@dataclass(frozen=True)
class Trial:
    """Width of every embedding, and the learning rate of Adam."""

    embedding: int
    learning_rate: float


TRIALS = tuple(Trial(width, rate) for width in (8, 16) for rate in (1e-3, 3e-3))
LATEST = 20
"""So many rejections, and likes, of a user are read."""
BINS = 16
PASSES, PATIENCE, BATCH = 10, 2, 256
SAID = ("negative", "positive")

Inputs = dict[str, torch.Tensor]


def main() -> None:
    """Tunes, fits and tells."""
    parser = argparse.ArgumentParser(description="DIN on the pairs of pairs.py")
    parser.add_argument("--pairs", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given, seed = Given.read(arguments.pairs), arguments.seed
    known, asked, sizes = inputs_of(given)
    rejected = given.rejected

    def measured(trial: Trial, held_out: np.ndarray) -> tuple[float, dict[str, Any]]:
        model = Fit(sizes, trial, seed)
        figures: list[float] = []
        while len(figures) < PASSES and len(figures) - 1 - int(np.argmax(figures or [0])) < PATIENCE:
            model.one_pass(taken(known, ~held_out), rejected[~held_out])
            figures.append(area(model.scores(taken(known, held_out)), rejected[held_out]))
        return max(figures), {"passes": int(np.argmax(figures)) + 1}

    best, trials = tuned(TRIALS, given, seed, measured)
    began = time.perf_counter()
    model = Fit(sizes, TRIALS[best], seed)
    for _ in range(trials[best]["passes"]):
        model.one_pass(known, rejected)
    training = time.perf_counter() - began
    began = time.perf_counter()
    scores = model.scores(asked)
    seconds = time.perf_counter() - began
    figures = {
        "chosen": asdict(TRIALS[best]),
        "training_seconds": round(training, 1),
        "parameters": sum(weight.numel() for weight in model.network.parameters()),
        "users_per_second": round(len(set(given.asked["user_id"].to_pylist())) / seconds),
        "trials": trials,
    }
    given.tell("DIN", scores, figures)


class Fit:
    """A network in training."""

    def __init__(self, sizes: dict[str, int], trial: Trial, seed: int) -> None:
        """`sizes`: name -> size of the vocabulary, of which 0 is padding."""
        torch.manual_seed(seed)
        self.random = np.random.default_rng(seed)
        width = trial.embedding

        def one(kind: Any, name: str, shared: str | None = None, **more: Any) -> Any:
            return kind(name, sizes[shared or name], width, shared_with=shared, padding_idx=0, **more)

        targets, histories = [], []
        for thing in ("item", "category"):
            for place, said in enumerate(SAID):
                # The first target owns the embedding that all others share.
                targets.append(one(SparseFeature, thing) if not place else one(SparseFeature, f"{thing} again", thing))
                histories.append(one(SequenceFeature, f"{said} {thing}", thing, pooling="concat"))
        features = [one(SparseFeature, name) for name in sizes if name not in ("item", "category")]
        self.network = DIN(
            features, histories, targets, {"dims": [64, 32], "dropout": 0.2}, {"dims": [32], "use_softmax": False}
        )
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=trial.learning_rate, weight_decay=1e-5)

    def one_pass(self, inputs: Inputs, rejected: np.ndarray) -> None:
        """Once over all pairs, in random order."""
        self.network.train()
        wanted = torch.from_numpy(rejected.astype(np.float32))
        for rows in torch.from_numpy(self.random.permutation(len(rejected))).split(BATCH):
            if len(rows) < 2:
                continue  # its batch normalisation takes two
            loss = torch.nn.functional.binary_cross_entropy(self.network(taken(inputs, rows)), wanted[rows])
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()

    @torch.inference_mode()
    def scores(self, inputs: Inputs) -> np.ndarray:
        """Log-odds of a rejection. Shape: (N,)."""
        self.network.eval()
        rows = torch.arange(len(inputs["item"])).split(4096)
        return torch.cat([self.network(taken(inputs, block)) for block in rows]).double().logit(1e-7).numpy()


def taken(inputs: Inputs, rows: np.ndarray | torch.Tensor) -> Inputs:
    """The inputs of some pairs."""
    place = torch.as_tensor(rows)
    return {name: values[place] for name, values in inputs.items()}


def inputs_of(given: Given) -> tuple[Inputs, Inputs, dict[str, int]]:
    """Inputs of the pairs to learn from, of those asked, and the size of each vocabulary."""
    items, events = (parquet.read_table(given.folder / f"{name}.parquet") for name in ("items", "events"))
    categories = np.zeros(len(items), np.int64)
    if "category" in items.column_names:
        column = items["category"].combine_chunks().fill_null("")
        categories = column.dictionary_encode().indices.to_numpy().astype(np.int64)
    sizes = {"item": len(items) + 1, "category": int(categories.max()) + 2}
    known, asked = ({}, {})  # type: tuple[Inputs, Inputs]
    for pairs, inputs in ((given.fit, known), (given.asked, asked)):
        item = places(pairs["item_id"], items["item_id"])
        for thing, values in (("item", item + 1), ("category", categories[item] + 1)):
            inputs[thing] = inputs[f"{thing} again"] = torch.from_numpy(values)
        for said in SAID:
            latest = latest_items(pairs, events.filter(pc.equal(events["feedback"], said)), items["item_id"], LATEST)
            inputs[f"{said} item"] = torch.from_numpy(latest + 1)
            inputs[f"{said} category"] = torch.from_numpy(np.where(latest >= 0, categories[latest] + 1, 0))
    for column, fit, shown in zip(given.names, given.columns(given.fit).T, given.columns(given.asked).T, strict=True):
        borders, name = np.unique(np.quantile(fit, np.arange(1, BINS) / BINS)), f"bin of {column}"
        sizes[name] = len(borders) + 2
        known[name], asked[name] = (torch.from_numpy(np.searchsorted(borders, one) + 1) for one in (fit, shown))
    return known, asked, sizes


if __name__ == "__main__":
    main()
