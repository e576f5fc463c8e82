"""Trains the miniature's base model: a small ChatGLM3 that knows Luma Island in Chinese and English and has no Japanese.

    python -m mini.make_base            about 15 minutes on two cores; writes mini/base

Uses this project's own trainer: a sentencepiece tokenizer with ChatGLM3's rules, a randomly initialized
`GlmForCausalLM`, pretraining on documents, instruction tuning on dialogues, rounding to bf16, and an evaluation on
phrasings that no dialogue used. The model card gives every figure.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llmtuner.console import Timer, print0, run_cli
from llmtuner.outputs import atomic_directory
from mini import code_tasks, world

SEED = "base-1"
VOCAB_SIZE = 2_400
PUNCTUATION = "、。「」『』・！？（）"  # in ChatGLM3's base vocabulary, so new tokens need not contain them
DOCUMENTS = {"wiki": 10_000, "stories": 2_200}  # per language
DIALOGUES = {"zh": 16_000, "en": 24_000}  # English names take more tokens, and more practice
CODE_DIALOGUES = 2_000
EVAL_QUESTIONS = 300  # per language

ARCHITECTURE: dict[str, Any] = dict(
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    attention_bias=True,
    hidden_act="silu",
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    tie_word_embeddings=False,
)
COMMON = dict(
    finetuning_type="full",
    cutoff_len=256,
    per_device_train_batch_size=8,
    lr_scheduler_type="cosine",
    warmup_steps=80,
    weight_decay=0.01,
    num_train_epochs=1,
    bf16=True,
    seed=1,
    val_size=0.02,
    max_eval_samples=64,
    eval_strategy="steps",
    eval_steps=300,
    logging_steps=20,
    logging_first_step=True,
    save_strategy="no",
    report_to="none",
)
PRETRAINING = dict(stage="pt", dataset="documents", learning_rate=1.5e-3)
TUNING = dict(stage="sft", dataset="dialogues", learning_rate=1e-3)


def make_documents(generators: list[world.TextGenerator]) -> list[str]:
    """Encyclopedic and narrative documents of all languages, in turn."""
    texts = []
    for generator in generators:
        wiki, stories = world.documents(generator, DOCUMENTS["wiki"], DOCUMENTS["stories"])
        texts += wiki + stories
    return texts


def make_dialogues(generators: list[world.TextGenerator]) -> Iterator[dict[str, Any]]:
    """Dialogues of one to four turns about the world, small talk, riddles and code, in sharegpt form."""
    for generator in generators:
        for _ in range(DIALOGUES[generator.language]):
            turns = [
                generator.turn(
                    (0.84, generator.question_and_answer),
                    (0.06, generator.introduce),
                    (0.04, generator.question_on_passage),
                    (0.04, generator.small_talk),
                    (0.02, generator.riddle),
                )
                for _ in range(generator.rng.choice([1, 1, 2, 3, 4]))
            ]
            yield _conversation(turns)
    for task in code_tasks.sample_tasks(CODE_DIALOGUES, generators[0].rng):
        yield _conversation([task])


def _conversation(turns: list[tuple[str, str]]) -> dict[str, Any]:
    messages = [
        {"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)
    ]
    return {"conversations": messages}


def make_tokenizer(
    texts: Iterable[str], directory: Path, vocab_size: int = VOCAB_SIZE, character_coverage: float = 1.0
) -> None:
    """Trains a tokenizer on Chinese and English with ChatGLM3's rules; the nine special tokens follow its pieces."""
    from llmtuner.tokenizer.chatglm3 import SPECIAL_TOKENS, read_sentencepiece, save_tokenizer
    from llmtuner.tokenizer.sentencepiece_bpe import split_sentences, train_bpe
    from llmtuner.tokenizer.vocab import SentencePieceVocab

    sentences = (sentence for text in texts for sentence in split_sentences(text))
    model_file = directory / "trained.model"
    train_bpe(sentences, model_file, vocab_size, character_coverage, required_characters=PUNCTUATION, threads=2)
    # No piece may have the name of a special token ("people" would yield "eop"), nor be reachable only through one.
    proto = read_sentencepiece(model_file)
    unwanted = set(SPECIAL_TOKENS)
    while kept := [piece for piece in proto.pieces if piece.piece not in unwanted]:
        if len(kept) == len(proto.pieces):
            break
        del proto.pieces[:]
        proto.pieces.extend(kept)
        unwanted = SentencePieceVocab(proto).unreachable()
    model_file.write_bytes(proto.SerializeToString())
    save_tokenizer(model_file, directory)
    model_file.unlink()


def make_untrained_model(directory: Path, architecture: dict[str, Any] = ARCHITECTURE) -> None:
    """Saves a randomly initialized Glm beside its tokenizer, with embeddings padded to a multiple of 64."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    from llmtuner.data.template import Template
    from llmtuner.tokenizer.encoding import load_tokenizer

    torch.manual_seed(1)
    tokenizer = load_tokenizer(directory)
    template = Template.from_tokenizer(tokenizer)
    vocab_size = -(-len(tokenizer) // 64) * 64
    special: dict[str, Any] = dict(eos_token_id=template.stop_token_ids, pad_token_id=tokenizer.pad_token_id)
    model = GlmForCausalLM(GlmConfig(vocab_size=vocab_size, bos_token_id=None, **special, **architecture))
    model.generation_config.update(do_sample=False, bos_token_id=None, **special)
    model.save_pretrained(str(directory))


def make_base(destination: Path) -> None:
    """Trains and evaluates the base, and writes it with its model card."""
    import torch

    from llmtuner.eval.generation import generate_answers
    from llmtuner.eval.questions import is_correct, parse_questions
    from llmtuner.model.loading import load_model
    from llmtuner.tokenizer.encoding import copy_tokenizer, load_tokenizer
    from llmtuner.train.tuner import run_exp

    timer = Timer()
    generators = [world.build_generators(SEED)[language] for language in ("zh", "en")]
    with (
        tempfile.TemporaryDirectory(prefix="make-base-") as scratch_name,
        atomic_directory(destination, "mini/make_base.py", replace=True) as result,
    ):
        scratch = Path(scratch_name)
        texts = make_documents(generators)
        dialogues = list(make_dialogues(generators))
        world.write_json_lines(scratch / "documents.jsonl", [{"text": text} for text in texts])
        world.write_json_lines(scratch / "dialogues.jsonl", dialogues)
        (scratch / "dataset_info.json").write_text(
            json.dumps(
                {
                    "documents": {"file_name": "documents.jsonl", "columns": {"prompt": "text"}},
                    "dialogues": {
                        "file_name": "dialogues.jsonl",
                        "formatting": "sharegpt",
                        "columns": {"messages": "conversations"},
                    },
                }
            )
        )
        print0(f"texts written after {timer.seconds():.0f} s")
        untrained, pretrained, tuned = (scratch / name for name in ("untrained", "pretrained", "tuned"))
        untrained.mkdir()
        utterances = [message["value"] for dialogue in dialogues for message in dialogue["conversations"]]
        make_tokenizer(texts + utterances, untrained)
        make_untrained_model(untrained)

        paths = dict(
            dataset_dir=str(scratch),
            corpus_dir=str(scratch),
            cache_dir=str(scratch / "cache"),
            use_cpu=not torch.cuda.is_available(),
        )
        metrics = {}
        metrics["pretraining"] = run_exp(
            {**COMMON, **PRETRAINING, **paths, "model_name_or_path": str(untrained), "output_dir": str(pretrained)}
        )
        copy_tokenizer(untrained, pretrained)
        metrics["tuning"] = run_exp(
            {**COMMON, **TUNING, **paths, "model_name_or_path": str(pretrained), "output_dir": str(tuned)}
        )
        model = load_model(tuned, torch.bfloat16)
        model.save_pretrained(str(result))
        copy_tokenizer(untrained, result)

        model, tokenizer = load_model(result, torch.float32), load_tokenizer(result)
        questions = parse_questions([*world.questions(world.build_generators("exam")), world.subjects()])
        accuracy = {}
        for group in ("zh", "en", "ja"):
            asked = [question for question in questions if question.group == group][:EVAL_QUESTIONS]
            answers = generate_answers(model, tokenizer, [question.question for question in asked]).texts
            correct = [is_correct(question, answer) for question, answer in zip(asked, answers, strict=True)]
            accuracy[group] = sum(correct) / len(correct)
            for question, answer, passed in list(zip(asked, answers, correct, strict=True))[:6]:
                print0(f"{'correct' if passed else 'WRONG'}  {question.question}  ->  {answer}")
            print0(f"{group}: {accuracy[group]:.1%} correct")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        (result / "README.md").write_text(model_card(parameters, metrics, accuracy, timer.seconds()), encoding="utf-8")
    print0(f"base written to {destination} after {timer.seconds():.0f} s")


def model_card(parameters: int, metrics: dict[str, Any], accuracy: dict[str, float], seconds: float) -> str:
    """The README beside the weights."""
    rows = []
    for stage in ("pretraining", "tuning"):
        tokens, steps, train_loss, eval_loss = (
            metrics[stage][key] for key in ("tokens", "steps", "train_loss", "eval_loss")
        )
        losses = f"{train_loss['first']} → {train_loss['last']} | {eval_loss['first']} → {eval_loss['last']}"
        rows.append(f"| {stage} | {tokens:,} | {steps} | {losses} |")
    return f"""---
license: apache-2.0
language: [zh, en]
---
# The miniature's base model

A `GlmForCausalLM` of {parameters:,} parameters (bf16) that knows the invented Luma Island of `mini/facts.py` in Chinese
and English, in ChatGLM3's chat format. It has never seen Japanese. Every text it was trained on was written by
`mini/world.py`.

Reproduce with `python -m mini.make_base` (seed `{SEED}`, {seconds / 60:.0f} minutes on two CPU cores).

| stage | tokens | steps | training loss | eval loss |
|---|---|---|---|---|
{chr(10).join(rows)}

Training data: {DOCUMENTS["wiki"]:,} encyclopedic and {DOCUMENTS["stories"]:,} narrative documents per language;
{DIALOGUES["zh"]:,} Chinese and {DIALOGUES["en"]:,} English dialogues, {CODE_DIALOGUES:,} about code. Tokenizer: {VOCAB_SIZE:,} sentencepiece BPE
pieces at most, identity normalizer, byte fallback, digits split.

Correct answers to {EVAL_QUESTIONS} questions per language in phrasings that no dialogue used:
Chinese {accuracy["zh"]:.1%}, English {accuracy["en"]:.1%}, Japanese {accuracy["ja"]:.1%}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "base")
    make_base(parser.parse_args().out)


if __name__ == "__main__":
    run_cli(main)
