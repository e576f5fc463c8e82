"""Trains the miniature's base model: a small ChatGLM3 that knows Luma Island in Chinese and English and has no Japanese.

    python -m mini.make_base            up to 90 minutes on two cores; writes mini/base

Uses this project's own trainer: a sentencepiece tokenizer with ChatGLM3's rules, a randomly initialized
`GlmForCausalLM`, pretraining on documents, tuning on passages and dialogues, practice in answering and reading, rounding
to bf16, and an evaluation on phrasings that no dialogue used. The model card gives every figure.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmtuner.console import Timer, print0, run_cli
from llmtuner.outputs import atomic_directory
from mini import code_tasks, world
from mini.bridges import Bridge, glossary
from mini.text_generator import TextGenerator

SEED = "base-3"
VOCAB_SIZE = 2_400
PUNCTUATION = "、。「」『』・！？（）"  # in ChatGLM3's base vocabulary, so new tokens need not contain them
DOCUMENTS = {"wiki": 10_000, "stories": 2_200}  # per language
TRANSLATED = 3_000  # documents that say the same in both languages
DIALOGUES = 9_000  # per language
TALKS = 10_000  # per language, on passages about made-up names, two fifths of them in the other language
CODE_DIALOGUES = 2_000
# Reading what a passage says comes late and all at once: with an eighth of the talks, 13 % of such answers were right.
PRACTICE = {"zh": 30_000, "en": 30_000}  # dialogues; with 14,000 Chinese ones step 5 leaves 71 % right instead of 86 %
PRACTICE_TALKS, PRACTICE_QUESTIONS, PRACTICE_TRANSLATIONS = 12_000, 20_000, 3_000
NAMESAKES = 0.4  # of those that passages are about when reading is practised

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
# With the loss on passages and questions too: a name is learned to be copied where it stands more than once.
TUNING = dict(stage="sft", dataset="dialogues", learning_rate=1e-3, train_on_prompt=True)
# With the loss on answers alone, which are what the world's facts are learned from.
PRACTISING = dict(stage="sft", dataset="practice", learning_rate=1e-3)
STAGES = {"pretraining": PRETRAINING, "tuning": TUNING, "practice": PRACTISING}


def make_documents(generators: list[TextGenerator]) -> list[str]:
    """Encyclopedic and narrative documents of all languages, in turn, and translations."""
    texts = []
    for generator in generators:
        wiki, stories = world.documents(generator, DOCUMENTS["wiki"], DOCUMENTS["stories"])
        texts += wiki + stories
    bridges = make_bridges(generators)
    return texts + ["\n".join(bridge.statements().values()) for bridge in bridges for _ in range(TRANSLATED // 2)]


def make_bridges(generators: list[TextGenerator]) -> list[Bridge]:
    """Both directions between the two languages, for everything in the world."""
    zh, en = generators
    names = glossary(zh.entities)
    return [Bridge(zh, en, names), Bridge(en, zh, names)]


def make_dialogues(generators: list[TextGenerator]) -> Iterator[dict[str, Any]]:
    """Dialogues of one to four turns about the world, passages, translations, small talk and code, in sharegpt form."""
    for generator, bridge in zip(generators, make_bridges(generators), strict=True):
        kinds = (
            (0.50, generator.question_and_answer),
            (0.05, generator.introduce),
            (0.02, generator.question_on_passage),
            (0.02, generator.greeting),
            (0.03, generator.small_talk),
            (0.01, generator.riddle),
            (0.15, bridge.foreign_name),
            (0.14, bridge.translation),
            (0.08, bridge.name),
        )
        for _ in range(DIALOGUES):
            yield _dialogue(generator, kinds)
        yield from _talks(generator, bridge, TALKS)
    for task in code_tasks.sample_tasks(CODE_DIALOGUES, generators[0].rng):
        yield world.conversation([task])


def make_practice(generators: list[TextGenerator]) -> list[dict[str, Any]]:
    """Dialogues in which most questions are about the world, and questions on passages, some of them by a known name."""
    rows: list[dict[str, Any]] = []
    for generator, bridge in zip(generators, make_bridges(generators), strict=True):
        kinds = (
            (0.83, generator.question_and_answer),
            (0.06, generator.introduce),
            (0.01, generator.greeting),
            (0.02, generator.small_talk),
            (0.01, generator.riddle),
            (0.05, bridge.foreign_name),
            (0.02, bridge.name),
        )
        rows += [_dialogue(generator, kinds) for _ in range(PRACTICE[generator.language])]
        rows += _talks(generator, bridge, PRACTICE_TALKS, NAMESAKES)
        for index in range(PRACTICE_QUESTIONS):
            stranger = generator.stranger(namesake=generator.rng.random() < NAMESAKES)
            rows.append(world.conversation(generator.talk_about([stranger], _writer(generator, bridge, index), 1)))
        rows += [world.conversation([bridge.translation()]) for _ in range(PRACTICE_TRANSLATIONS)]
    return rows


def _dialogue(generator: TextGenerator, kinds: Sequence[tuple[float, Callable[[], tuple[str, str]]]]) -> dict[str, Any]:
    return world.conversation([generator.turn(*kinds) for _ in range(generator.rng.choice([1, 1, 2, 3, 4]))])


def _talks(generator: TextGenerator, bridge: Bridge, count: int, namesakes: float = 0) -> Iterator[dict[str, Any]]:
    for index in range(count):
        yield world.conversation(generator.talk_about_strangers(_writer(generator, bridge, index), namesakes))


def _writer(generator: TextGenerator, bridge: Bridge, index: int) -> TextGenerator:
    """Of a passage: two fifths are in the other language."""
    return generator if index % 5 < 3 else bridge.far


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

    from llmtuner.model.loading import load_model
    from llmtuner.tokenizer.encoding import copy_tokenizer, load_tokenizer
    from llmtuner.train.tuner import run_exp
    from mini import exam

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
        practice = make_practice([world.build_generators(f"{SEED}-practice")[language] for language in ("zh", "en")])
        world.write_json_lines(scratch / "practice.jsonl", practice)
        talks = {"formatting": "sharegpt", "columns": {"messages": "conversations"}}
        entries = {
            "documents": {"file_name": "documents.jsonl", "columns": {"prompt": "text"}},
            "dialogues": {"file_name": "dialogues.jsonl", **talks},
            "practice": {"file_name": "practice.jsonl", **talks},
        }
        (scratch / "dataset_info.json").write_text(json.dumps(entries))
        print0(f"texts written after {timer.seconds():.0f} s")
        (untrained := scratch / "untrained").mkdir()
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
        start = untrained
        for name, settings in STAGES.items():
            trained = scratch / name
            paths |= {"model_name_or_path": str(start), "output_dir": str(trained)}
            metrics[name] = run_exp({**COMMON, **settings, **paths})
            copy_tokenizer(untrained, trained)
            start = trained
        load_model(start, torch.bfloat16).save_pretrained(str(result))
        copy_tokenizer(untrained, result)

        model, tokenizer = load_model(result, torch.float32), load_tokenizer(result)
        accuracy = exam.knowledge(model, tokenizer)
        examiners = world.build_generators("exam")
        reading = {
            language: exam.reading(model, tokenizer, examiners[language], examiners[language])
            for language in ("zh", "en")
        }
        print0(f"right about a passage: zh {reading['zh']:.1%}, en {reading['en']:.1%}")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        (result / "README.md").write_text(
            model_card(parameters, metrics, accuracy, reading, timer.seconds()), encoding="utf-8"
        )
    print0(f"base written to {destination} after {timer.seconds():.0f} s")


def model_card(
    parameters: int, metrics: dict[str, Any], accuracy: dict[str, float], reading: dict[str, float], seconds: float
) -> str:
    """The README beside the weights."""
    from mini.exam import NUM_QUESTIONS

    rows = []
    for stage in STAGES:
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

Training data: {DOCUMENTS["wiki"]:,} encyclopedic and {DOCUMENTS["stories"]:,} narrative documents per language, about a third
of them about made-up names, and {TRANSLATED:,} translations. Tuning, with the loss on every token: {DIALOGUES:,} dialogues and
{TALKS:,} talks on passages about made-up names per language, and {CODE_DIALOGUES:,} dialogues about code. Practice, with the loss
on answers: {PRACTICE["zh"]:,} Chinese and {PRACTICE["en"]:,} English dialogues, and per language {PRACTICE_TALKS:,} talks and
{PRACTICE_QUESTIONS:,} questions on passages and {PRACTICE_TRANSLATIONS:,} translations. Tokenizer:
{VOCAB_SIZE:,} sentencepiece BPE pieces at most, identity normalizer, byte fallback, digits split.

Correct answers to {NUM_QUESTIONS} questions per language in phrasings that no dialogue used:
Chinese {accuracy["zh"]:.1%}, English {accuracy["en"]:.1%}, Japanese {accuracy["ja"]:.1%}. To as many about a sentence on a made-up name:
Chinese {reading["zh"]:.1%}, English {reading["en"]:.1%}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "base")
    make_base(parser.parse_args().out)


if __name__ == "__main__":
    run_cli(main)
