"""Models that tests of several folders read: the tiny model with new tokens, and ChatGLM3's original format converted."""

import pytest

from llmtuner.model.loading import load_model
from llmtuner.outputs import atomic_directory
from llmtuner.tokenizer.encoding import copy_tokenizer, load_tokenizer
from llmtuner.weights.convert_chatglm import convert_chatglm
from llmtuner.weights.embedding_init import NewTokens
from llmtuner.weights.resize_embeddings import resize_token_embeddings
from tests.checkpoints import TINY


@pytest.fixture(scope="module")
def grown_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model with 64 rows more, of which 60 are new pieces', as step 3 writes it."""
    directory = tmp_path_factory.mktemp("grown") / "model"
    rows = load_model(tiny_model_dir).config.vocab_size
    new = NewTokens(rows, [[5 + number, 9] for number in range(60)], 0, range(3, rows - 9))
    with atomic_directory(directory) as partial:
        copy_tokenizer(tiny_model_dir, partial)
        resize_token_embeddings(tiny_model_dir, partial, new, 64)
    return directory


@pytest.fixture(scope="module")
def grown_family_dir(family_dir, tmp_path_factory):
    """The same of a model of another family."""
    directory = tmp_path_factory.mktemp("grown-family") / "model"
    first = len(load_tokenizer(family_dir))
    new = NewTokens(first, [[5 + number, 9] for number in range(60)], None, range(410))
    with atomic_directory(directory) as partial:
        copy_tokenizer(family_dir, partial)
        resize_token_embeddings(family_dir, partial, new, 64)
    return directory


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "glm"
    convert_chatglm(TINY, directory)
    return directory
