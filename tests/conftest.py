"""Fixtures that several folders share: a tiny chat model, quantized to NVFP4.

On a machine without a GPU, Triton kernels are tested in Triton's interpreter. It is chosen by a variable that must be
set before Triton is first imported, which transformers does too, so it is set here, for the whole process. Nothing else
of the suite runs Triton kernels; tests that compile them do so in processes of their own.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# processes side by side share the processors: otherwise each starts a thread for every one of them
if (_workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _workers))


def pytest_report_header() -> str | None:
    """Says what is left out."""
    return None if find_spec("triton") else "Triton is not installed: tests/kernels_triton is left out"


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def write_tokenizer(folder: Path) -> int:
    """A tokenizer of single bytes with a chat template; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return len(alphabet) + len(SPECIAL)


def write_dense_model(folder: Path, **options: object) -> None:
    """A tiny random Llama in bf16 with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab = write_tokenizer(folder)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "max_position_embeddings": 256,
        "eos_token_id": 257,
        "pad_token_id": 256,
        "bos_token_id": None,
        **options,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 6.0)
    model.to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny unquantized chat model."""
    folder = tmp_path_factory.mktemp("dense")
    write_dense_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(dense_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in NVFP4, W4A4, compressed-tensors layout."""
    from anyfp4.tools.quantize import quantize_checkpoint

    out = tmp_path_factory.mktemp("tiny") / "nvfp4"
    return quantize_checkpoint(dense_model, out).out
