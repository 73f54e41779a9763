"""What the hostile tests share."""

import pathlib

import pytest

import axpo_jax
from axpo_jax.model.chat import Chat

TINY = pathlib.Path(axpo_jax.__file__).parent / "assets" / "tiny_tokenizer"


@pytest.fixture(scope="session")
def chat() -> Chat:
  return Chat.from_pretrained(TINY)
