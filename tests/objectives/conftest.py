"""A tiny Llama and a word tokenizer, made here, so that trl's trainers run on a CPU without a hub."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<end>", "<unk>", *(f"w{i}" for i in range(20))]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return made


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Weights spread wide, so that log-probs differ by nats and not by rounding."""
    folder = tmp_path_factory.mktemp("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.4,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def llama(llama_folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(llama_folder).eval()


@pytest.fixture
def other_llama(llama_folder: Path) -> LlamaForCausalLM:
    """The same model, a little way off: a policy and its reference."""
    model = LlamaForCausalLM.from_pretrained(llama_folder).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model
