"""A model's layers and its head; logits of some tokens, from their rows of the output head alone, in float32.

A semantic ID's next code is one of a few hundred tokens of a vocabulary of 50 to 180 thousand: the other rows of the
head are neither multiplied nor, where an adapter trains some, copied into a new matrix.

    logits = row_logits(head, hidden, range(first_code, first_code + codes))       # (..., H) -> (..., codes)
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from conrec.errors import ConfigError


def decoder_and_head(model: Any) -> tuple[Any, Any]:
    """The stack of layers and the output head of a causal language model, with or without a peft adapter."""
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise ConfigError(
            f"attention {model.config._attn_implementation!r} takes no mask of its own per position; load the model "
            "with attn_implementation='sdpa'"
        )
    return model.get_decoder(), model.get_output_embeddings()


def row_logits(head: Any, hidden: Tensor, rows: range | tuple[int, ...]) -> Tensor:
    """Logits of these tokens. Shape: (..., H) -> (..., len(rows)) float32.

    In float32, since logits rounded to bfloat16 would tie beams and blur a verdict. A head wrapped by an adapter that
    may do more than replace rows runs as it is.
    """
    if type(head) is torch.nn.Linear:
        place = _place(rows)
        bias = None if head.bias is None else head.bias[place].float()
        return functional.linear(hidden.float(), head.weight[place].float(), bias)
    trained = _trained_rows(head, rows)
    if trained is not None:
        return functional.linear(hidden.float(), trained.float())
    return head(hidden)[..., _place(rows)].float()


def _trained_rows(head: Any, rows: range | tuple[int, ...]) -> Tensor | None:
    """Rows that peft trains beside a frozen plain head; None unless all of these are such rows."""
    adapter = getattr(head, "token_adapter", None)
    if adapter is None or type(adapter.base_layer) is not torch.nn.Linear:
        return None
    if adapter.merged or adapter.disable_adapters or len(adapter.active_adapters) != 1:
        return None
    name = adapter.active_adapters[0]
    trained = adapter.token_indices[name]
    first = bisect_left(trained, rows[0])
    if isinstance(rows, range):
        # Ascending and without repetition: the ends are in place where all between them are.
        last = first + len(rows) - 1
        whole = last < len(trained) and (trained[first], trained[last]) == (rows[0], rows[-1])
        return adapter.trainable_tokens_delta[name][first : last + 1] if whole else None
    places = [bisect_left(trained, row) for row in rows]
    if any(place == len(trained) or trained[place] != row for place, row in zip(places, rows, strict=True)):
        return None
    return adapter.trainable_tokens_delta[name][places]


def _place(rows: range | tuple[int, ...]) -> slice | list[int]:
    return slice(rows.start, rows.stop) if isinstance(rows, range) else list(rows)
