"""What tests of engines share: sixty IDs, a model that answers for them, prompts of any length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conrec.catalogue.trie import Trie
from conrec.policy.model import save_checkpoint, word_tokenizer
from conrec.policy.vocabulary import Vocabulary, add_tokens
from conrec.ragged import Ragged
from conrec.tables import PROMPTS, check

LEVELS, CODES = 3, 6
SEMANTIC_IDS = np.unique(np.random.default_rng(1).integers(0, CODES, (60, LEVELS)), axis=0)
TRIE = Trie.build(SEMANTIC_IDS, CODES)


def save_tiny(folder: Path) -> None:
    """A random model of this vocabulary, with a generation_config that must not prune a beam."""
    tokenizer = word_tokenizer(["one two three"])
    add_tokens(tokenizer, LEVELS, CODES)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **heads))
    save_checkpoint(model, tokenizer, folder)
    # What a checkpoint from elsewhere may bring: it must not prune a beam.
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 1, "top_p": 0.01}')


def make_prompts(vocabulary: Vocabulary, *lengths: int) -> Ragged:
    tokens = np.random.default_rng(2).integers(
        vocabulary.begin, vocabulary.first_code_token + LEVELS * CODES, sum(lengths)
    )
    return Ragged.from_lengths(tokens.astype(np.int32), np.array(lengths))


def prompts_table(vocabulary: Vocabulary, users: int, length: int = 32) -> pa.Table:
    table = pa.table(
        {
            "user_id": [f"user {number:03d}" for number in range(users)],
            "prompt": make_prompts(vocabulary, *[length] * users).to_arrow(),
            "excluded_leaves": Ragged.from_lengths(np.zeros(users, np.int32), np.ones(users, np.int64)).to_arrow(),
            "digest": pa.array(np.arange(users, dtype=np.uint64)),
        }
    )
    return check(table, PROMPTS, "prompts")


def committed(folder: Path) -> list[Path]:
    return [path for path in (folder / "progress").glob("*.parquet") if ".pending" not in path.name]
