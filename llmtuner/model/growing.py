"""Grows a model's input and output embeddings for the pieces that a merged tokenizer adds.

A new row is the mean of the rows of the native pieces that spelled the new piece until now: its bytes or sub-pieces
(the common strong baseline, e.g. SambaLingo, arXiv 2404.05829). For output rows this has a useful consequence: the new
logit is the mean of native logits, so, but for the rounding of stored rows, it never exceeds the greatest of them, and
greedy answers stay what they were. Step 4 measures whether they did.
Rows of padding are copies of `<unk>`'s, which is never a target, so they stay inert for the same reason.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmtuner.console import InputError


@dataclass(frozen=True)
class NewPieces:
    """Which ids are new, and which native ids spell each of them."""

    first_id: int
    spellings: list[list[int]]
    unknown_id: int

    @property
    def end(self) -> int:
        return self.first_id + len(self.spellings)


def find_new_pieces(base_tokenizer: Path, merged_tokenizer: Path) -> NewPieces:
    """Compares two sentencepiece models; new pieces stand behind the base's and the special tokens.

    Raises:
        InputError: if the second does not continue the first.
    """
    import sentencepiece

    from llmtuner.tokenizer.fast import SPECIAL_TOKENS

    base = sentencepiece.SentencePieceProcessor(model_file=str(base_tokenizer))
    merged = sentencepiece.SentencePieceProcessor(model_file=str(merged_tokenizer))
    size = base.get_piece_size()
    if any(base.id_to_piece(i) != merged.id_to_piece(i) for i in range(size)):
        raise InputError(
            f"{merged_tokenizer} does not begin with the pieces of {base_tokenizer}. Merge again with this base."
        )
    first_id = size + len(SPECIAL_TOKENS)
    newline = base.encode("\n")  # [▁, newline]: what follows is spelled as inside a text
    spellings = []
    for new_id in range(first_id, merged.get_piece_size()):
        text = merged.id_to_piece(new_id).replace("▁", " ")
        spellings.append(base.encode("\n" + text)[len(newline) :])
    return NewPieces(first_id, spellings, base.unk_id())


def grow_embeddings(model: PreTrainedModel, new: NewPieces, multiple: int) -> None:
    """Grows both matrices in place to a multiple of `multiple` rows; rows below `new.first_id` keep every bit."""
    rows = -(-new.end // multiple) * multiple
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    for module in modules:
        old = module.weight.data
        grown = torch.empty(max(rows, old.shape[0]), old.shape[1], dtype=old.dtype, device=old.device)
        grown[: new.first_id] = old[: new.first_id]
        for offset, spelling in enumerate(new.spellings):
            grown[new.first_id + offset] = old[spelling].float().mean(dim=0).to(old.dtype)
        grown[new.end :] = old[new.unknown_id]
        module.weight = torch.nn.Parameter(grown, requires_grad=module.weight.requires_grad)
        for attribute in ("num_embeddings", "out_features"):
            if hasattr(module, attribute):
                setattr(module, attribute, grown.shape[0])
    model.config.vocab_size = grown.shape[0]
    model.config.tie_word_embeddings = False
    model.vocab_size = grown.shape[0]
