"""What `benchmarks/gpu.py` measures: shapes, cells, and the operations and bytes that a cell needs at least.

What is counted, beside what the same run measured of one large matrix product and of one copy on the device:

    matrices      = layers (H (q + 2 k) + q H + 3 H I)        H hidden size, I intermediate size; q, k: query heads and
                                                             key heads times the head size
    forward(n, s) = 2 matrices n + 4 layers q s              n positions, s: how many they attend to, summed
    head(n, V)    = 2 H V n                                  V rows of the head, at n positions
    supervised    = 3 (forward(n, n (length + 1) / 2) + head(targets, whole vocabulary))
    GRPO          = 3 (forward + head) once over every prompt and its completions, however often the step computes them
    prompts only  = forward over the prompts
    decoding      = prompts only + forward over L W positions, each attending to its prompt and to its own codes
    bytes, decoding = (1 + L) matrices + (1 + L) keys and values of the prompts: once written, L times read

Padding, the reference, sampling and repeated prompts count as nothing: they are what keeps a step from the ceiling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

LEVELS = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only model of a `family` of transformers."""

    name: str
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int

    @property
    def matrices(self) -> int:
        """Weights that every position is multiplied by, the head left out."""
        query, key = self.heads * self.head_size, self.key_heads * self.head_size
        return self.layers * (
            self.hidden * (query + 2 * key) + query * self.hidden + 3 * self.hidden * self.intermediate
        )

    def forward(self, positions: float, seen: float) -> float:
        """Floating-point operations of the layers."""
        return 2 * self.matrices * positions + 4 * self.layers * self.heads * self.head_size * seen

    def head(self, positions: float, rows: int) -> float:
        """Floating-point operations of so many rows of the output head."""
        return 2 * self.hidden * rows * positions

    def prompts(self, count: int, length: int) -> float:
        """`forward` over so many prompts."""
        return self.forward(count * length, count * length * (length + 1) / 2)

    def beams(self, count: int, length: int, width: int, levels: int) -> float:
        """`forward` over the first `levels` codes of `width` completions of each prompt."""
        each = width * sum(length + level + 1 for level in range(levels))
        return self.forward(count * width * levels, count * each)

    def cache(self, tokens: int, size: int) -> float:
        """Bytes of the keys and values of so many tokens."""
        return 2 * self.layers * self.key_heads * self.head_size * size * tokens


@dataclass(frozen=True)
class Plan:
    """What is measured, on a catalogue of so many items, and how long at most; `users`: in a batch at most."""

    groups: tuple[Group, ...]
    items: int
    codes: int
    users: int
    matrix: int
    copy_mib: int
    cell_seconds: float
    seconds: float


@dataclass(frozen=True)
class Group:
    """The cells of one model in one precision.

    `trained`: (prompt length, tokens a step, group sizes); `asked`: (prompt length, widths); `budgets`: positions
    computed at a time that are compared, with the first prompt length and the middle width of `asked`.
    """

    shape: Shape
    dtype: str
    trained: tuple[tuple[int, int, tuple[int, ...]], ...]
    asked: tuple[tuple[int, tuple[int, ...]], ...]
    budgets: tuple[int, ...] = ()
    profiled: bool = False


EXAMPLE = Shape("example 1M", "llama", 128, 384, 4, 4, 4, 32, 1024)
HALF = Shape("0.5B", "qwen2", 896, 4864, 24, 14, 2, 64, 151_936)
LARGE = Shape("1.7B", "qwen3", 2048, 6144, 28, 16, 8, 128, 151_936)
WIDTHS = (20, 100, 256)
FULL = Plan(
    groups=(
        Group(EXAMPLE, "float32", ((64, 2048, (64,)),), ((64, (20, 100)),)),
        Group(EXAMPLE, "bfloat16", ((64, 2048, (64,)),), ((64, (100,)),)),
        Group(
            HALF,
            "bfloat16",
            ((512, 16_384, (16, 64)), (1024, 16_384, (16,))),
            ((1000, WIDTHS), (256, WIDTHS), (5000, WIDTHS)),
            (8_192, 32_768, 65_536, 131_072),
            True,
        ),
        Group(
            LARGE,
            "bfloat16",
            ((512, 8_192, (16,)),),
            ((1000, WIDTHS), (256, WIDTHS), (5000, WIDTHS)),
            (8_192, 32_768, 65_536, 131_072),
            True,
        ),
        Group(HALF, "float32", ((512, 8_192, (16,)),), ((1000, (100,)), (256, (100,)), (5000, (100,)))),
    ),
    items=100_000,
    codes=256,
    users=100_000,
    matrix=8192,
    copy_mib=2048,
    cell_seconds=1.5,
    seconds=190.0,
)
_SMALL = Shape("tiny", "qwen3", 32, 48, 2, 4, 2, 16, 160)
TINY = Plan(
    groups=(
        Group(_SMALL, "float32", ((16, 64, (4,)),), ((16, (2, 5)),), (64, 256), True),
        Group(_SMALL, "bfloat16", ((16, 64, (4,)),), ((24, (5,)),)),
    ),
    items=200,
    codes=16,
    users=8,
    matrix=128,
    copy_mib=1,
    cell_seconds=0.05,
    seconds=60.0,
)


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal language model of this shape with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": shape.family != "llama",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = AutoConfig.for_model(shape.family, **sizes)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
