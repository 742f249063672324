"""benchmarks/rivals/instruct: each score belongs to the film that was asked about, however the films are listed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

HOME = Path(__file__).parents[1] / "benchmarks" / "rivals" / "instruct"

pytestmark = pytest.mark.long


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A tiny model and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["[UNK]", "Yes", "No", ".", *"ABCDEFGHIJKLMNOPQRST", *(f"t{item}" for item in range(30))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("system", ["tallrec", "instructrec"])
def test_scores_stand_where_their_films_are_asked(weights: Path, monkeypatch, system: str) -> None:
    import torch
    from transformers import AutoTokenizer

    monkeypatch.syspath_prepend(str(HOME))
    monkeypatch.delitem(sys.modules, "instruct", raising=False)
    import instruct

    random = np.random.default_rng(0)
    asked = np.where(
        np.arange(20) < np.array([[20], [7], [1]]), random.permuted(np.tile(np.arange(30), (3, 1)), axis=1)[:, :20], -1
    )
    questions = {"liked": asked[:, :3], "rejected": asked[:, 3:5], "asked": asked}
    reader = instruct.Reader.of(system, [f"t{item}" for item in range(30)], AutoTokenizer.from_pretrained(weights))
    ranker = instruct.Ranker.of(str(weights), reader, torch.device("cpu"), 200, torch.float32)
    found = instruct.scores_of(ranker, {"here": questions}, ["here"], 1, 3)["here"]
    assert (np.isnan(found) == (asked < 0)).all()
    for row in range(3):
        # The same orders are drawn, one question at a time and without batches.
        columns = instruct.shuffled(questions, np.arange(3), np.random.default_rng(3))[row]
        columns = columns[asked[row, columns] >= 0]
        if system == "tallrec":
            cells = np.stack([np.full(len(columns), row), columns], axis=1)
            alone = [ranker.answers([prompt]) for prompt in reader.prompts(questions, cells, cells)]
            said = np.concatenate(alone)
            expected = said[:, 0] - said[:, 1]
        else:
            (prompt,) = reader.prompts(questions, np.array([row]), columns[None])
            listed = [reader.titles[item] for item in asked[row, columns]]
            assert [prompt.tokens[place : place + 1] for place in titles_behind_letters(prompt, reader)] == listed
            expected = ranker.answers([prompt])[0, : len(columns)] + np.log(len(columns))
        np.testing.assert_allclose(found[row, columns], expected, atol=1e-5)


def test_a_head_that_films_share_learns_as_if_each_had_its_own(weights: Path, monkeypatch) -> None:
    """Of questions with 20, 7 and 1 films in one step: the loss and every gradient."""
    import torch
    from transformers import AutoTokenizer

    monkeypatch.syspath_prepend(str(HOME))
    monkeypatch.delitem(sys.modules, "instruct", raising=False)
    import instruct

    monkeypatch.setattr(instruct, "DROPOUT", 0.0)
    asked = np.where(np.arange(20) < np.array([[20], [7], [1]]), np.arange(60).reshape(3, 20) % 30, -1)
    questions = {
        "liked": asked[:, :3],
        "rejected": asked[:, 3:5],
        "asked": asked,
        "answers": np.where(asked < 0, -1, 1),
    }
    questions["answers"][:, ::2] = 0
    reader = instruct.Reader.of("tallrec", [f"t{item}" for item in range(30)], AutoTokenizer.from_pretrained(weights))
    prompts = reader.prompts(questions, np.argwhere(asked >= 0), np.zeros(0))
    assert len(prompts) == 28 and len(instruct.by_head(prompts)) == 3
    apart = [instruct.Prompt(list(prompt.head), prompt.tail, prompt.answers, prompt.answer) for prompt in prompts]
    found = []
    for given in (prompts, apart):
        torch.manual_seed(0)
        ranker = instruct.Ranker.of(str(weights), reader, torch.device("cpu"), 200, torch.float32)
        for name, values in ranker.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(values, std=0.1)
        loss = instruct.loss_of(ranker, given)
        loss.backward()
        found.append([loss, *(values.grad for values in ranker.model.parameters() if values.requires_grad)])
    assert len(found[0]) == 15
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert {place for batch in instruct.batches(prompts, 40) for place in batch.tolist()} == set(range(28))


def titles_behind_letters(prompt, reader) -> list[int]:
    """Where the titles stand of what is listed: behind a letter and its full stop."""
    letters = [reader.pieces[letter] for letter in "ABCDEFGHIJKLMNOPQRST"[: prompt.answers]]
    places = [place for place in range(len(prompt.tokens) - 2) if prompt.tokens[place : place + 2] in letters]
    return [place + 2 for place in places]
