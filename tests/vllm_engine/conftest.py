"""Tests that run vLLM itself, on the CPU build that `make test-vllm` installs; each file in a process of its own."""

from __future__ import annotations

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where tests can look into it
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest
from tests_support import build_model, build_tokenizer

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: run `make test-vllm`")


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    """A random model of shapes that vLLM's CPU attention has kernels for."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    return build_model(tokenizer, head_dim=32, initializer_range=0.15, tie_word_embeddings=False, **sizes).eval()


@pytest.fixture(scope="session")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
