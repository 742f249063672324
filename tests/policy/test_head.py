"""Rows of a head are the columns of all its logits, whatever wraps it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from conrec.policy.head import row_logits

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
TRAINED = [1, 2, 3, 4, 5, 9, 11, 12]


def model_of(tied: bool, modules: list[str]) -> torch.nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=tied, **SIZES))
    if not modules:
        return model
    tokens = {"embed_tokens": TRAINED} | ({} if tied or "lm_head" in modules else {"lm_head": TRAINED})
    model = get_peft_model(model, LoraConfig(r=2, target_modules=modules, trainable_token_indices=tokens))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


@pytest.mark.parametrize("rows", [range(2, 6), range(4, 10), range(11, 13), range(12, 15), (9, 4), (9, 7), (1, 19)])
@pytest.mark.parametrize(
    ("tied", "modules"),
    [(False, []), (True, []), (True, ["q_proj"]), (False, ["q_proj"]), (False, ["q_proj", "lm_head"])],
)
def test_rows_are_columns_of_all_logits_and_have_their_gradient(tied, modules, rows):
    """1e-6; rows that are trained beside the head, some of them, or none."""
    model = model_of(tied, modules)
    head = (model.get_base_model() if modules else model).get_output_embeddings()
    hidden = torch.randn(3, 2, 8, requires_grad=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found, plain = row_logits(head, hidden, rows), head(hidden)[..., list(rows)]
    torch.testing.assert_close(found, plain)
    weights = torch.randn(plain.shape)
    gradients = [
        torch.autograd.grad((logits * weights).sum(), [hidden, *trained], allow_unused=True)
        for logits in (found, plain)
    ]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_trained_rows_need_no_copy_of_the_head():
    model = model_of(True, ["q_proj"])
    head = model.get_base_model().get_output_embeddings()
    called = []
    head.register_forward_hook(lambda *given: called.append(1))
    row_logits(head, torch.randn(2, 8), range(2, 6))
    assert not called
    with model.disable_adapter():
        row_logits(head, torch.randn(2, 8), range(2, 6))
    assert called
