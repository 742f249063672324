"""The language model: a pretrained checkpoint with LoRA, or a small Llama from scratch.

Invariant: whatever is trained, `merged` returns plain transformers weights, which `transformers` and vLLM load
without any code of ours. With LoRA the rows of the new tokens are trained beside the adapters and all old
rows stay frozen.

    model, tokenizer, vocabulary = build_model(config, texts)
    save_checkpoint(model, tokenizer, Path("checkpoint"))                          # what vLLM loads
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch.utils.checkpoint import checkpoint

from conrec import storage
from conrec.config import Config
from conrec.errors import ConfigError
from conrec.policy.vocabulary import Vocabulary, add_tokens


def build_model(config: Config, texts: list[str]) -> tuple[Any, Any, Vocabulary]:
    """(model, tokenizer, vocabulary) before any training; the same for the same seed.

    From scratch, the tokenizer holds the words of `texts` and the code tokens. Raises `ConfigError` if the named
    model cannot be loaded.
    """
    torch.manual_seed(config.seed)
    dtype = getattr(torch, config.model.dtype)
    levels, codes = config.quantizer.levels, config.quantizer.codes
    if config.model.name_or_path is None:
        tokenizer = word_tokenizer(texts)
        vocabulary = add_tokens(tokenizer, levels, codes)
        return _small_llama(config, tokenizer).to(dtype), tokenizer, vocabulary
    model, tokenizer = _pretrained(config.model.name_or_path, dtype)
    old_rows = model.get_input_embeddings().num_embeddings
    vocabulary = add_tokens(tokenizer, levels, codes)
    model.resize_token_embeddings(max(len(tokenizer), old_rows), mean_resizing=True)
    if config.lora is not None:
        model = _with_lora(model, config, vocabulary)
    return model, tokenizer, vocabulary


def _pretrained(name_or_path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # Said, so that transformers refuses a checkpoint that brings code and does not ask at the terminal.
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except ValueError as error:
        raise ConfigError(
            f"model.name_or_path = {name_or_path!r} cannot be loaded: {str(error).splitlines()[0]}; code that a "
            "checkpoint brings is never run: name a model whose architecture transformers has"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"model.name_or_path = {name_or_path!r} cannot be loaded: {str(error).splitlines()[0]}; "
            "write a Hugging Face name that this machine can reach, or the folder of a safetensors checkpoint"
        ) from error
    return model, tokenizer


def word_tokenizer(texts: list[str], max_words: int = 20_000) -> Any:
    """A tokenizer of whole words and marks of punctuation, the most frequent `max_words` of `texts`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    counts = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    # Numbers would fill the vocabulary (authors, lengths): they are read digit by digit.
    words = [word for word, _ in counts.most_common() if not word.isdigit()][:max_words]
    entries = ["<pad>", "<unk>", *"0123456789", *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def _small_llama(config: Config, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = config.model
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads,
            intermediate_size=sizes.intermediate_size,
            attention_dropout=sizes.attention_dropout,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _with_lora(model: Any, config: Config, vocabulary: Vocabulary) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    assert lora is not None
    marks = [vocabulary.begin, vocabulary.rejected, vocabulary.liked, vocabulary.shown, vocabulary.item]
    marks += [vocabulary.text, vocabulary.choose, vocabulary.end]
    rows = [
        *marks,
        *range(vocabulary.first_code_token, vocabulary.first_code_token + vocabulary.levels * vocabulary.codes),
    ]
    layers = {"embed_tokens": sorted(rows)}
    if not model.config.tie_word_embeddings:
        layers["lm_head"] = sorted(rows)
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=list(lora.target_modules),
            trainable_token_indices=layers,
            task_type="CAUSAL_LM",
        ),
    )


def recompute_layers(model: Any) -> None:
    """From here on a layer keeps its input alone for the backward pass, and is computed again there.

    Not by the switch of transformers, which works in training mode only: GRPO trains without dropout.
    Raises `ConfigError` if the architecture has no layers that transformers would do this with.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"train.recompute_layers = true, but {type(model).__name__} has no layers that can be computed again; "
            "write false, and a smaller train.tokens_at_once"
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def put_tensors(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Copies trained tensors into the parameters of those names."""
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(tensors[name])


def write_tensors(tensors: dict[str, torch.Tensor], url: str) -> None:
    """One safetensors file on any store."""
    storage.write_bytes(url, save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}))


def read_tensors(url: str) -> dict[str, torch.Tensor]:
    """What `write_tensors` wrote."""
    return load(storage.read_bytes(url))


def merged(model: Any) -> Any:
    """Plain transformers weights: adapters and token rows folded in. The model itself is left as it is."""
    if not hasattr(model, "merge_and_unload"):
        return model
    import copy

    return copy.deepcopy(model).merge_and_unload()


def save_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes safetensors weights, configuration and tokenizer; nothing that generates on its own settings."""
    plain = merged(model)
    plain.generation_config = type(plain.generation_config)(pad_token_id=tokenizer.pad_token_id)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
