"""Adapters of the tiny model: prepared, trained without steps, saved, and compared."""

import resource
from contextlib import contextmanager

import torch

from llmtuner.hparams import FinetuningArguments
from llmtuner.model.adapters import init_adapter, save_adapter
from llmtuner.model.loading import load_model
from llmtuner.weights.lazy_checkpoint import open_checkpoint

BOTH = ["embed_tokens", "lm_head"]
KINDS = {
    "lora": dict(lora_rank=4),
    "one layer's kind": dict(lora_rank=4, lora_target=["q_proj"], lora_alpha=3),
    "rslora": dict(lora_rank=4, use_rslora=True),
    "dora": dict(lora_rank=4, use_dora=True),
    "embeddings": dict(lora_rank=4, additional_target=BOTH),
    "norms": dict(lora_rank=4, additional_target=["input_layernorm", "o_proj"]),
    "new rows": dict(lora_rank=4, additional_target=BOTH, train_new_tokens_only=True),
    "dora, new rows of one matrix": dict(
        lora_rank=4, use_dora=True, additional_target=["lm_head"], train_new_tokens_only=True
    ),
    "freeze": dict(finetuning_type="freeze", additional_target=["lm_head", "norm"]),
    "full": dict(finetuning_type="full"),
}
IDS = torch.randint(10, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def prepare(directory, adapter=None, dtype=torch.float32, **settings):
    torch.manual_seed(1)
    return init_adapter(load_model(directory, dtype), FinetuningArguments(**settings), adapter)


def train(model):
    """Moves everything that is trained, without the steps."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def trained_run(base, run, **settings):
    model = train(prepare(base, **settings))
    save_adapter(model, run, base)
    return model


def stored(directory):
    return {name: tensor.read_rows(0, tensor.shape[0]) for name, tensor in open_checkpoint(directory).items()}


@contextmanager
def largest_file(size):
    """For real: no file of more than so many bytes can be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
