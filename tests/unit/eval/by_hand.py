"""What a model computes, in plain loops: one sequence at a time, no batch, no cache."""

import torch


@torch.no_grad()
def log_likelihood(model, ids, start):
    """Of ids[start:], one forward pass, no batch."""
    log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_probabilities[place - 1, ids[place]]) for place in range(start, len(ids)))


@torch.no_grad()
def greedy(model, ids, tokens, stop_token_ids):
    """Ids that a model writes, by argmax and without a cache."""
    written = []
    while len(written) < tokens:
        written.append(int(model(torch.tensor([[*ids, *written]])).logits[0, -1].argmax()))
        if written[-1] in stop_token_ids:
            return written[:-1]
    return written
