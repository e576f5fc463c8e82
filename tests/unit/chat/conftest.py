"""A chat session with the tiny model, and answers written in advance."""

import pytest
import torch

from llmtuner.chat.session import ChatSession
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.encoding import encode, load_tokenizer


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    return load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)


@pytest.fixture
def dialogue(loaded):
    return ChatSession(*loaded)


@pytest.fixture
def script(loaded, monkeypatch):
    """Lets the model say given ids, or the tokens of a text; an exception among them is raised."""
    model, tokenizer = loaded
    seen = []

    def scripted(*ids):
        def generate(input_ids, streamer, stopping_criteria, generation_config, **_):
            seen.append(generation_config)
            streamer.put(input_ids)
            for one in ids:
                if isinstance(one, Exception):
                    raise one
                streamer.put(torch.tensor([one]))
                if stopping_criteria(input_ids, None).all():
                    break
            streamer.end()

        monkeypatch.setattr(model, "generate", generate)
        return seen

    return lambda *ids: scripted(*(encode(tokenizer, ids[0]) if ids and isinstance(ids[0], str) else ids))
