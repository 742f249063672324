"""TALLRec and InstructRec: a small language model with low-rank adapters that reads titles.

    python instruct.py tallrec --questions questions.npz --weights smollm2-135m --out tallrec.npz
    python instruct.py instructrec --questions questions.npz --weights smollm2-135m --out instructrec.npz

Needs numpy, torch, transformers and peft, no conrec. `questions.py` makes the file. Frozen weights are bfloat16, which
a core with instructions for it computes three times as fast as float32.

- TALLRec (Bao et al., RecSys 2023): titles that the user liked and rejected, then "will the user reject this one? Yes
  or No". The score is the log-odds of Yes.
- InstructRec (Zhang et al., 2023): the same titles and an instruction with the candidates listed, each behind a letter.
  The score is log P(letter) + log(number of letters), the mean over `--orders` random orders.

What departs from the papers: the loss is that of the answer among the words that answer (two, or the letters listed),
since nothing else is ever scored; and 135 million parameters instead of 7 and 3 thousand million. Every rate of
`--rates` trains for `--seconds`, read twice on questions that were held back, and the best reading answers. The
rate falls with the time that is used up, so the machine's speed decides only how much is learned.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

RANK, ALPHA, DROPOUT = 16, 32, 0.05
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
READINGS = 2
HELD_PROMPTS = 1000
"""Films of some fifty questions for TALLRec, which so reads each history once."""
POOL = 512
"""Questions whose prompts are made at once."""
LETTERS = "ABCDEFGHIJKLMNOPQRST"
ANSWERED = ("candidates", "pairs", "windows")
OPEN, CLOSE = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
ASKED = {
    "tallrec": ("Will the user reject this film? Answer Yes or No.\n", ("judge", "judge_held"), ("Yes", "No")),
    "instructrec": (
        "Which of these films will the user reject? Answer with its letter.\n",
        ("choose", "choose_held"),
        tuple(LETTERS),
    ),
}

Questions = dict[str, np.ndarray]


@dataclass(frozen=True)
class Prompt:
    """Token ids, the number of answers it allows, and the answer: a column of them, or -1.

    Prompts of one question have one list as their head: it is read once for all of them.
    """

    head: list[int]
    tail: list[int]
    answers: int
    answer: int

    @property
    def tokens(self) -> list[int]:
        """All of it."""
        return self.head + self.tail


@dataclass(frozen=True)
class Reader:
    """Makes prompts of questions, from pieces that are tokenised once; `heads`: those of the histories so far."""

    system: str
    titles: list[list[int]]
    pieces: dict[str, list[int]]
    words: list[int]
    heads: dict[bytes, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, system: str, titles: list[str], tokenizer: Any) -> Reader:
        """`system`: tallrec or instructrec."""
        instruction, _, words = ASKED[system]
        texts = {
            "open": OPEN,
            "liked": "Films the user liked:\n",
            "rejected": "Films the user rejected:\n",
            "ask": instruction,
            "close": CLOSE,
            **{letter: f"{letter}." for letter in LETTERS},
        }
        pieces = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}
        lines = tokenizer([f" {title}\n" for title in titles], add_special_tokens=False)["input_ids"]
        answers = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        assert all(len(answer) == 1 for answer in answers), "an answer is one token"
        return cls(system, lines, pieces, [answer[0] for answer in answers])

    def prompts(self, questions: Questions, cells: np.ndarray, order: np.ndarray) -> list[Prompt]:
        """Of the cells (N, 2), rows and columns of questions, or of rows (N,) with the order (N, C) of their items."""
        return self._judged(questions, cells) if self.system == "tallrec" else self._listed(questions, cells, order)

    def _judged(self, questions: Questions, cells: np.ndarray) -> list[Prompt]:
        answers = questions.get("answers", np.full(questions["asked"].shape, -1))
        return [
            # Yes stands first of the words.
            Prompt(
                self._head(questions, row),
                self.titles[questions["asked"][row, column]] + self.pieces["close"],
                2,
                1 - int(answers[row, column]) if answers[row, column] >= 0 else -1,
            )
            for row, column in cells.tolist()
        ]

    def _listed(self, questions: Questions, rows: np.ndarray, order: np.ndarray) -> list[Prompt]:
        found = []
        answers = questions.get("answers", np.full(questions["asked"].shape, -1))
        for row, columns in zip(rows.tolist(), order, strict=True):
            columns = columns[questions["asked"][row, columns] >= 0]
            tokens = list(self._head(questions, row))
            for letter, item in zip(LETTERS, questions["asked"][row, columns].tolist(), strict=False):
                tokens = tokens + self.pieces[letter] + self.titles[item]
            right = np.flatnonzero(answers[row, columns] == 1)
            found.append(Prompt(tokens, self.pieces["close"], len(columns), int(right[0]) if len(right) else -1))
        return found

    def _head(self, questions: Questions, row: int) -> list[int]:
        history = questions["liked"][row].tobytes() + questions["rejected"][row].tobytes()
        if history not in self.heads:
            self.heads[history] = self._tokens(questions, row)
        return self.heads[history]

    def _tokens(self, questions: Questions, row: int) -> list[int]:
        tokens = list(self.pieces["open"])
        for kind in ("liked", "rejected"):
            items = questions[kind][row]
            tokens += self.pieces[kind]
            for item in items[items >= 0].tolist():
                tokens += self.titles[item]
        return tokens + self.pieces["ask"]


@dataclass
class Ranker:
    """The model, and what it says of prompts."""

    model: Any
    reader: Reader
    device: torch.device
    tokens_at_once: int

    @classmethod
    def of(
        cls,
        weights: str,
        reader: Reader,
        device: torch.device,
        tokens_at_once: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Ranker:
        """From a folder of transformers, with fresh adapters, which are float32."""
        base = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype).to(device)
        adapters = LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
        )
        return cls(get_peft_model(base, adapters), reader, device, tokens_at_once)

    def logits(self, prompts: list[Prompt]) -> torch.Tensor:
        """Of the words that answer, -inf for those that a prompt does not list. Shape: (B, W) float32."""
        groups = by_head(prompts)
        if len(groups) == len(prompts):
            last = self._last([prompt.tokens for prompt in prompts])
        else:
            parts = [self._behind([prompts[place] for place in places]) for places in groups]
            last = torch.cat(parts)[torch.tensor(np.argsort(np.concatenate(groups)), device=self.device)]
        words = torch.tensor(self.reader.words, device=self.device)
        logits = last.float() @ self.model.get_base_model().lm_head.weight[words].float().T
        allowed = torch.tensor([prompt.answers for prompt in prompts], device=self.device)
        found: torch.Tensor = logits.masked_fill(
            torch.arange(len(words), device=self.device) >= allowed[:, None], -math.inf
        )
        return found

    def _behind(self, prompts: list[Prompt]) -> torch.Tensor:
        """Of prompts with one head: what stands behind their last tokens. Shape: (B, H)."""
        head = torch.tensor([prompts[0].head], device=self.device)
        cache = self.model.get_base_model().model(input_ids=head, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(prompts))
        return self._last([prompt.tail for prompt in prompts], cache)

    def _last(self, sequences: list[list[int]], cache: Any = None) -> torch.Tensor:
        """The hidden state of the last token of each, behind what the cache holds. Shape: (B, H)."""
        lengths = torch.tensor([len(tokens) for tokens in sequences])
        ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
        for row, tokens in enumerate(sequences):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        # Padding on the right is seen by nothing that is read, so no mask is needed and the fast kernel runs.
        inner = self.model.get_base_model().model
        hidden = inner(input_ids=ids.to(self.device), past_key_values=cache, use_cache=cache is not None)
        last: torch.Tensor = hidden.last_hidden_state[
            torch.arange(len(sequences), device=self.device), lengths.to(self.device) - 1
        ]
        return last

    @torch.no_grad()
    def answers(self, prompts: list[Prompt]) -> np.ndarray:
        """Log-probabilities of the words of each prompt. Shape: (N, W) float32."""
        self.model.eval()
        found = np.empty((len(prompts), len(self.reader.words)), np.float32)
        for places in batches(prompts, 2 * self.tokens_at_once):
            block = self.logits([prompts[place] for place in places]).log_softmax(dim=1)
            found[places] = block.cpu().numpy()
        return found

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of the adapters."""
        return {name: values.detach().clone() for name, values in get_peft_model_state_dict(self.model).items()}


def by_head(prompts: list[Prompt]) -> list[np.ndarray]:
    """Places of the prompts of each head."""
    groups: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(id(prompt.head), []).append(place)
    return [np.array(places) for places in groups.values()]


def batches(prompts: list[Prompt], most: int) -> Iterator[np.ndarray]:
    """Places in batches of similar lengths and about so many tokens; prompts of one head stay together."""
    groups = sorted(by_head(prompts), key=lambda places: -len(prompts[places[0]].head))
    batch: list[np.ndarray] = []
    tokens = 0
    for places in groups:
        cost = len(prompts[places[0]].head) + sum(len(prompts[place].tail) for place in places)
        if batch and tokens + cost > most:
            yield np.concatenate(batch)
            batch, tokens = [], 0
        batch.append(places)
        tokens += cost
    if batch:
        yield np.concatenate(batch)


def shuffled(questions: Questions, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Columns of each question in random order, padding anywhere. Shape: (N, C)."""
    return np.argsort(random.random((len(rows), questions["asked"].shape[1])), axis=1)


def drawn(
    reader: Reader, questions: Questions, random: np.random.Generator, pool: int = POOL
) -> Iterator[list[Prompt]]:
    """Endless pools of the prompts of so many questions, every question in turn, in random order."""
    rows = np.arange(len(questions["asked"]))
    while True:
        random.shuffle(rows)
        for first in range(0, len(rows), pool):
            part = rows[first : first + pool]
            if reader.system == "tallrec":
                places, columns = np.nonzero(questions["answers"][part] >= 0)
                yield reader.prompts(questions, np.stack([part[places], columns], axis=1), part)
            else:
                yield reader.prompts(questions, part, shuffled(questions, part, random))


def train(
    ranker: Ranker, learned: Questions, held: list[Prompt], rate: float, given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Trains for the seconds or steps that are given; rows of what was read, and the adapters of the best."""
    torch.manual_seed(given.seed)
    random = np.random.default_rng(given.seed)
    parameters = [parameter for parameter in ranker.model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    rows: list[dict[str, Any]] = []
    best, began, step, seen, losses = -math.inf, time.perf_counter(), 0, 0, []
    spent = 0.0
    for pool in drawn(ranker.reader, learned, random):
        order = list(batches(pool, ranker.tokens_at_once))
        for batch in random.permutation(len(order)):
            ranker.model.train()
            prompts = [pool[place] for place in order[batch]]
            done = max(spent / given.seconds, step / given.steps if given.steps else 0.0)
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 20) * max(0.0, 1 - done)
            loss = loss_of(ranker, prompts)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            step, seen = step + 1, seen + len(prompts)
            spent = time.perf_counter() - began
            done = max(spent / given.seconds, step / given.steps if given.steps else 0.0)
            if done >= (len(rows) + 1) / READINGS:
                figure = read(ranker, held)
                row = {"rate": rate, "step": step, "prompts": seen, "seconds": round(spent, 1)}
                rows.append(row | {"loss": round(float(np.mean(losses[-50:])), 4), "held": round(figure, 4)})
                print(json.dumps(rows[-1]), flush=True)
                if figure > best:
                    best, rows[-1]["state"] = figure, ranker.state()
                # Reading is not training.
                began = time.perf_counter() - spent
            if done >= 1:
                return rows
    raise AssertionError("pools never end")


def loss_of(ranker: Ranker, prompts: list[Prompt]) -> torch.Tensor:
    """Of the right answer among those that are allowed."""
    target = torch.tensor([prompt.answer for prompt in prompts], device=ranker.device)
    logits = ranker.logits(prompts)
    if ranker.reader.system == "tallrec":
        return binary_cross_entropy_with_logits(logits[:, 0] - logits[:, 1], 1.0 - target)
    return cross_entropy(logits, target)


def read(ranker: Ranker, held: list[Prompt]) -> float:
    """AUC of Yes against No, or the share of right letters."""
    said, right = ranker.answers(held), np.array([prompt.answer for prompt in held])
    if ranker.reader.system == "instructrec":
        return float((said.argmax(axis=1) == right).mean())
    scores, rejected = said[:, 0] - said[:, 1], right == 0
    ranks = np.argsort(np.argsort(scores)) + 1.0
    positives = int(rejected.sum())
    return float((ranks[rejected].sum() - positives * (positives + 1) / 2) / max(1, positives * (~rejected).sum()))


def scores_of(
    ranker: Ranker, splits: dict[str, Questions], names: Sequence[str], orders: int, seed: int
) -> dict[str, np.ndarray]:
    """Score of every item that is asked about in these splits, NaN for padding. Shape: (Q, C) float32 each."""
    if ranker.reader.system == "instructrec":
        return {name: _of_orders(ranker, splits[name], orders, seed) for name in names}
    cells = {name: np.argwhere(splits[name]["asked"] >= 0) for name in names}
    # At once: a history that several of them ask about is read once.
    prompts = [prompt for name in names for prompt in ranker.reader.prompts(splits[name], cells[name], cells[name])]
    said = np.split(ranker.answers(prompts), np.cumsum([len(cells[name]) for name in names])[:-1])
    found = {}
    for name, words in zip(names, said, strict=True):
        found[name] = np.full(splits[name]["asked"].shape, np.nan, np.float32)
        found[name][tuple(cells[name].T)] = words[:, 0] - words[:, 1]
    return found


def _of_orders(ranker: Ranker, questions: Questions, orders: int, seed: int) -> np.ndarray:
    """The mean over random orders in which the items are listed."""
    asked = questions["asked"]
    random, rows = np.random.default_rng(seed), np.arange(len(asked))
    counts = (asked >= 0).sum(axis=1)
    total = np.zeros(asked.shape, np.float32)
    for _ in range(orders):
        order = shuffled(questions, rows, random)
        said = ranker.answers(ranker.reader.prompts(questions, rows, order))
        # The letters go to what is there, in this order: the place of a column is how many of these lie before it.
        there = np.take_along_axis(asked, order, axis=1) >= 0
        letters = np.maximum(np.cumsum(there, axis=1) - 1, 0)
        values = np.where(there, np.take_along_axis(said, letters, axis=1), np.nan)
        part = np.empty_like(total)
        np.put_along_axis(part, order, values + np.log(counts)[:, None].astype(np.float32), axis=1)
        total += part
    return total / orders


def loaded(path: Path, most: int | None) -> tuple[list[str], dict[str, Questions]]:
    """Titles, and the questions of each split."""
    with np.load(path) as file:
        splits: dict[str, Questions] = {}
        for name in file.files:
            if "/" in name:
                split, column = name.split("/")
                splits.setdefault(split, {})[column] = file[name][:most]
        return file["titles"].tolist(), splits


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("system", choices=tuple(ASKED))
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--weights", required=True, help="a folder that transformers loads")
    parser.add_argument("--out", type=Path, required=True, help="the .npz of scores; the log lies beside it as .json")
    parser.add_argument("--seconds", type=float, default=30.0, help="of training, for each rate")
    parser.add_argument("--steps", type=int, help="of training at most, for each rate")
    parser.add_argument("--rates", default="3e-4,1e-3", help="learning rates, each a trial")
    parser.add_argument("--orders", type=int, default=4, help="of the candidates, for InstructRec")
    parser.add_argument("--tokens", type=int, default=16384, help="of a training step")
    parser.add_argument("--most", type=int, help="questions of each split, for a trial run")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Trains, answers, and writes scores and log."""
    given, began = arguments(), time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    titles, splits = loaded(given.questions, given.most)
    reader = Reader.of(given.system, titles, AutoTokenizer.from_pretrained(given.weights))
    ranker = Ranker.of(given.weights, reader, device, given.tokens)
    learn_from, read_on = ASKED[given.system][1]
    held = next(drawn(reader, splits[read_on], np.random.default_rng(given.seed), HELD_PROMPTS))[:HELD_PROMPTS]
    fresh, rows = ranker.state(), [{"rate": 0.0, "step": 0, "held": round(read(ranker, held), 4)}]
    for rate in map(float, given.rates.split(",")):
        set_peft_model_state_dict(ranker.model, fresh)
        rows += train(ranker, splits[learn_from], held, rate, given)
    trained = time.perf_counter()
    best = max((row for row in rows if "state" in row), key=lambda row: row["held"])
    set_peft_model_state_dict(ranker.model, best["state"])
    scores: dict[str, Any] = dict(scores_of(ranker, splits, ANSWERED, given.orders, given.seed))
    answering = time.perf_counter() - trained
    save(given.out, scores)
    asked = sum(len(splits[name]["asked"]) for name in ANSWERED)
    log = {
        "system": given.system,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "versions": {"torch": torch.__version__},
        "parameters": sum(parameter.numel() for parameter in ranker.model.parameters()),
        "trained_parameters": sum(p.numel() for p in ranker.model.parameters() if p.requires_grad),
        "chosen": {name: value for name, value in best.items() if name != "state"},
        "readings": [{name: value for name, value in row.items() if name != "state"} for row in rows],
        "questions_per_second": round(asked / answering, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }
    given.out.with_suffix(".json").write_text(json.dumps(log, indent=2) + "\n")
    print(f"{given.out}: {log['seconds']} s, held {best['held']} at rate {best['rate']:g}", flush=True)
    set_peft_model_state_dict(ranker.model, fresh)
    untuned = scores_of(ranker, splits, ("candidates", "windows"), 1, given.seed)
    scores |= {f"untuned/{name}": values for name, values in untuned.items()}
    save(given.out, scores)


def save(out: Path, scores: dict[str, Any]) -> None:
    """Whole or not at all."""
    beside = out.with_suffix(".partial.npz")
    np.savez_compressed(beside, **scores)
    beside.replace(out)


if __name__ == "__main__":
    main()
