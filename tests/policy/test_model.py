"""Checkpoints load as plain transformers models; LoRA trains the adapters and the new rows, and nothing else."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import tiny_config, tiny_model

from conrec.config import Config
from conrec.errors import ArtefactError, ConfigError
from conrec.policy.model import build_model, put_tensors, read_tensors, save_checkpoint, trainable, write_tensors
from conrec.policy.vocabulary import Vocabulary


@pytest.fixture
def pretrained(tmp_path):
    """A checkpoint without code tokens, as a hub would give it, with a generation_config that prunes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from conrec.policy.model import word_tokenizer

    tokenizer = word_tokenizer(["one red item", "two blue items"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=64, tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.generation_config.update(do_sample=True, top_k=1)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def lora_config(path) -> Config:
    data = tiny_config().model_dump(mode="json")
    return Config.model_validate(data | {"model": {"name_or_path": str(path)}, "lora": {"rank": 4, "alpha": 8}})


def forward(model, tokens):
    model.eval()
    with torch.no_grad():
        return model(tokens).logits


def test_a_saved_policy_loads_without_our_code(tmp_path):
    model, tokenizer, vocabulary = tiny_model(tiny_config())
    save_checkpoint(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(forward(loaded, tokens), forward(model, tokens))
    assert Vocabulary.of(AutoTokenizer.from_pretrained(tmp_path), 2, 4) == vocabulary
    assert not list(tmp_path.glob("*.bin"))


def test_lora_trains_adapters_and_new_rows_only_and_merges_into_plain_weights(pretrained, tmp_path):
    model, tokenizer, vocabulary = build_model(lora_config(pretrained), ["one red item"])
    rows_before = model.get_input_embeddings()(torch.arange(len(tokenizer))).detach().clone()
    optimiser = torch.optim.SGD(trainable(model).values(), lr=1.0)
    tokens = torch.tensor([[2, 3, vocabulary.first_code_token, vocabulary.rejected, vocabulary.first_code_token + 5]])
    model.train()
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        optimiser.step()
    rows_after = model.get_input_embeddings()(torch.arange(len(tokenizer))).detach()
    changed = np.flatnonzero((rows_before != rows_after).any(-1).numpy())
    assert set(changed.tolist()) >= {vocabulary.first_code_token, vocabulary.rejected}
    assert changed.min() >= min(vocabulary.begin, vocabulary.first_code_token)
    save_checkpoint(model, tokenizer, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(forward(loaded, tokens), forward(model, tokens), rtol=1e-4, atol=1e-5)
    assert loaded.generation_config.top_k != 1
    model.save_pretrained(tmp_path / "adapter", safe_serialization=True)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_a_model_that_cannot_be_loaded_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=r"name_or_path.*nowhere"):
        build_model(lora_config(tmp_path / "nowhere"), ["text"])


def test_a_policy_of_another_catalogue_is_refused(tmp_path):
    _, tokenizer, _ = tiny_model(tiny_config())
    with pytest.raises(ArtefactError, match="<c_0>"):
        Vocabulary.of(tokenizer, 3, 4)


def test_trained_tensors_written_and_read_make_the_same_model(tmp_path):
    """Also of LoRA, where only the trained ones are written, and of views that share memory."""
    config = tiny_config()
    trained, _, _ = tiny_model(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(trained).values():
            parameter.normal_()
    url = str(tmp_path / "policy.safetensors")
    write_tensors(trainable(trained), url)
    found = read_tensors(url)
    assert found.keys() == trainable(trained).keys()
    assert not any(tensor.requires_grad for tensor in found.values())
    other, _, _ = tiny_model(config)
    tokens = torch.arange(12)[None]
    assert not torch.equal(forward(other, tokens), forward(trained, tokens))
    held = [parameter.data_ptr() for parameter in other.parameters()]
    put_tensors(other, found)
    torch.testing.assert_close(forward(other, tokens), forward(trained, tokens), rtol=0, atol=0)
    # Copied into the parameters that an optimiser may hold, which stay trainable.
    assert [parameter.data_ptr() for parameter in other.parameters()] == held
    assert all(parameter.requires_grad for parameter in other.parameters())

    square = torch.arange(6.0).reshape(2, 3)
    write_tensors({"turned": square.T}, url)
    torch.testing.assert_close(read_tensors(url)["turned"], square.T)


def test_tensors_of_another_model_are_refused():
    model, _, _ = tiny_model(tiny_config())
    tensors = {name: tensor for name, tensor in trainable(model).items() if "layers.1" not in name}
    with pytest.raises(KeyError, match=r"layers\.1"):
        put_tensors(model, tensors)


def test_lora_tensors_are_those_that_training_changes(pretrained, tmp_path):
    model, _, _ = build_model(lora_config(pretrained), ["one red item"])
    url = str(tmp_path / "policy.safetensors")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.1)
    write_tensors(trainable(model), url)
    again, _, _ = build_model(lora_config(pretrained), ["one red item"])
    assert 0 < len(read_tensors(url)) < len(again.state_dict())
    put_tensors(again, read_tensors(url))
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(forward(again, tokens), forward(model, tokens), rtol=0, atol=0)


def test_attention_dropout_is_of_training_only():
    tokens = torch.arange(12)[None]
    for share, differs in ((0.5, True), (0.0, False)):
        model, _, _ = tiny_model(tiny_config(model={"attention_dropout": share}))
        model.train()
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, model(tokens).logits) != differs
        assert torch.equal(forward(model, tokens), forward(model, tokens))


def test_a_checkpoint_that_asks_to_run_its_own_code_is_refused(tmp_path):
    """Without asking at the terminal, and without loading a known architecture in place of the one it means."""
    ran = tmp_path / "ran"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "modeling.py").write_text(f"open({str(ran)!r}, 'w')")
    auto_map = {"AutoConfig": "modeling.Theirs", "AutoModelForCausalLM": "modeling.Theirs"}
    settings = {"model_type": "theirs", "architectures": ["Theirs"], "auto_map": auto_map}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="never run"):
        build_model(tiny_config(model={"name_or_path": str(tmp_path / "model")}), ["one text"])
    assert not ran.exists()
