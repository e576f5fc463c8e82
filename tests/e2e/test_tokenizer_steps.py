"""Steps 1 and 2: from texts to a merged tokenizer, and what they reject."""

import json
import os
import subprocess
import sys

import pytest

from llmtuner.tokenizer.chatglm3 import NORMAL, read_sentencepiece
from llmtuner.tokenizer.merge_vocab import (
    filter_candidates,
    merge_reachable,
)
from llmtuner.tokenizer.sentencepiece_bpe import (
    split_sentences,
    train_bpe,
)
from llmtuner.tokenizer.vocab import read_vocab
from tests.helpers import ROOT
from tests.tokenizers import CHINESE, ENGLISH, JA, JAPANESE, make_sentencepiece, new_tokens, save_model, write_corpus


@pytest.fixture(scope="session")
def candidate_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("candidates") / "ja.model"
    train_bpe((sentence for text in JAPANESE for sentence in split_sentences(text)), file, 600, threads=1)
    return file


def run_step(script, work, base, corpus, **variables):
    """Runs a step with arguments from another working directory, with torch made unimportable."""
    script, *arguments = script.split()
    code = f"import sys, runpy; sys.modules['torch'] = None; sys.argv = {[script, *arguments]!r}; "
    code += f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    environment = {key: value for key, value in os.environ.items() if key not in ("OVERWRITE", "PROFILE")}
    environment |= {"WORK_DIR": str(work), "BASE_MODEL_DIR": str(base), "CORPUS_DIR": str(corpus), **variables}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=work.parent, env=environment, capture_output=True, text=True, timeout=50
    )


TEXT_FILES = {
    "ja_wiki.train.jsonl": JAPANESE,
    "ja_aozora.train.jsonl": JAPANESE[::-1],
    "zh_wiki.train.jsonl": CHINESE,
    "ja_x.test.jsonl": JAPANESE,
    "zh_x.test.jsonl": CHINESE,
    "en_x.test.jsonl": ENGLISH,
}


@pytest.fixture
def places(tmp_path):
    """CORPUS_DIR with texts, and WORK_DIR with an empty corpus so that the miniature is not generated."""
    corpus, work = tmp_path / "texts", tmp_path / "work"
    (work / "corpus").mkdir(parents=True)
    (work / "corpus" / "questions.jsonl").touch()
    write_corpus(corpus, TEXT_FILES)
    return corpus, work


def metrics_of(work, step):
    return json.loads((work / "metrics" / f"{step}.json").read_text())


def test_steps_1_and_2_end_to_end(places, tiny_tokenizer_dir):
    corpus, work = places
    early = run_step("step2_merge_tokenizer.py", work, tiny_tokenizer_dir, corpus)
    assert early.returncode == 2
    assert "made by step 1: run " in early.stderr

    first = run_step("step1_train_tokenizer.py --compare", work, tiny_tokenizer_dir, corpus)
    assert first.returncode == 0, first.stderr
    step1 = metrics_of(work, "step1")
    assert (step1["method"], step1["skipped"]) == ("continued", 0)
    base = read_sentencepiece(tiny_tokenizer_dir / "tokenizer.model")
    candidates = read_sentencepiece(work / "step1_ja_tokenizer" / "ja_bpe.model")
    assert len(candidates.pieces) == step1["vocab_size"] == len(base.pieces) + step1["new_pieces"]
    assert sum(step1["pieces_by_script"].values()) == step1["new_pieces"] > 50
    per_character = step1["tokens_per_character"]
    assert 2 < per_character["base"] < 3.1
    assert per_character["continued"] < 1
    assert per_character["original project"] < 1
    again = run_step("step1_train_tokenizer.py", work, tiny_tokenizer_dir, corpus)
    assert again.returncode == 2
    assert "OVERWRITE=1" in again.stderr

    second = run_step("step2_merge_tokenizer.py", work, tiny_tokenizer_dir, corpus)
    assert second.returncode == 0, second.stderr
    metrics = metrics_of(work, "step2")
    assert metrics.pop("made_from").keys() == {"base tokenizer", "ja_bpe.model"}
    assert [*metrics.pop("languages")] == ["ja", "zh", "en"]  # in this order: the added one first
    ratio = metrics.pop("token_ratio")
    assert ratio.pop("ja") < 0.3
    assert ratio == {"zh": 1.0, "en": 1.0}
    split = metrics.pop("segmentations")
    assert len(split["ja"]["after"]) < len(split["ja"]["before"])
    as_bytes = [
        bytes.fromhex(token[3:-1]) if token.startswith("<0x") else token.encode() for token in split["ja"]["after"]
    ]
    assert b"".join(as_bytes).decode().strip() == split["ja"]["text"]
    assert all(split[language]["before"] == split[language]["after"] for language in ("zh", "en"))
    assert metrics == {
        "method": "exact",
        "base_pieces": len(base.pieces),
        "added_pieces": step1["new_pieces"],  # all new tokens
        "pieces_by_script": step1["pieces_by_script"],
        "unreachable_tokens": 0,
        "special_ids_kept": True,
        "changed_texts": {"zh": 0, "en": 0},
        "texts": {"ja": 40, "zh": 40, "en": 40},
        "examples_of_changes": {"zh": [], "en": []},
    }

    original = work / "step1_ja_tokenizer" / "original_bpe.model"
    command = f"step2_merge_tokenizer.py --method original --candidates {original}"
    compared = run_step(command, work, tiny_tokenizer_dir, corpus)
    assert compared.returncode == 0, compared.stderr
    comparison = json.loads((work / "step2_original_method" / "metrics.json").read_text())
    assert comparison["changed_texts"]["zh"] > 30  # texts contain numbers, whose digits the original does not split
    assert comparison["examples_of_changes"]["zh"][0]["before"] != comparison["examples_of_changes"]["zh"][0]["after"]
    assert metrics_of(work, "step2")["method"] == "exact"  # the result stays

    (corpus / "ja_wiki.train.jsonl").write_text('{"text": "猫"}\n{"text": \n', encoding="utf-8")
    damaged = run_step("step1_train_tokenizer.py", work, tiny_tokenizer_dir, corpus, OVERWRITE="1")
    assert damaged.returncode == 2
    assert "ja_wiki.train.jsonl, line 2" in damaged.stderr
    assert (work / "step1_ja_tokenizer" / "ja_bpe.model").is_file()  # the finished result is still there
    assert sorted(path.name for path in (work / "step1_ja_tokenizer").parent.glob("step1*")) == ["step1_ja_tokenizer"]


def test_step_1_by_sentencepiece_or_on_top_of_other_pieces(places, tiny_tokenizer_dir, candidate_file):
    corpus, work = places
    first = run_step("step1_train_tokenizer.py --method sentencepiece", work, tiny_tokenizer_dir, corpus)
    assert first.returncode == 0, first.stderr
    metrics = metrics_of(work, "step1")
    assert (metrics["method"], metrics["skipped"]) == ("sentencepiece", 0)
    model = read_sentencepiece(work / "step1_ja_tokenizer" / "ja_bpe.model")
    assert len(model.pieces) == metrics["vocab_size"] > metrics["new_pieces"]
    assert not model.normalizer_spec.precompiled_charsmap

    command = f"step1_train_tokenizer.py --start {candidate_file} --sample-mb 0.002"
    second = run_step(command, work, tiny_tokenizer_dir, corpus, OVERWRITE="1")
    assert second.returncode == 0, second.stderr
    base = read_sentencepiece(tiny_tokenizer_dir / "tokenizer.model")
    vocab = read_vocab(tiny_tokenizer_dir)
    chosen = new_tokens(
        merge_reachable(vocab, filter_candidates(vocab, read_vocab(candidate_file), JA, CHINESE).accepted)[0], vocab
    )
    pieces = [piece.piece for piece in read_sentencepiece(work / "step1_ja_tokenizer" / "ja_bpe.model").pieces]
    assert pieces[len(base.pieces) :][: len(chosen)] == chosen
    assert len(pieces) > len(base.pieces) + len(chosen)
    assert 2000 < metrics_of(work, "step1")["input_bytes"] < 2400


def test_step_1_requires_chinese_text_before_it_reads_japanese(places, tiny_tokenizer_dir):
    corpus, work = places
    (corpus / "zh_wiki.train.jsonl").unlink()
    result = run_step("step1_train_tokenizer.py", work, tiny_tokenizer_dir, corpus, HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert "zh_" in result.stderr
    assert "reading" not in result.stderr


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda proto: proto.pieces.add(piece="", score=-1e6, type=NORMAL), "an empty piece"),
        (lambda proto: proto.pieces.add(piece="sop", score=-1e6, type=NORMAL), "a special token's name"),
        (lambda proto: proto.pieces.add(piece="の▁の", score=-1e6, type=NORMAL), "a space inside"),
        (lambda proto: proto.pieces.add(piece=proto.pieces[-1].piece, score=-1e6, type=NORMAL), "2 times"),
    ],
)
def test_step_2_rejects_invalid_candidates(places, tiny_tokenizer_dir, candidate_file, tmp_path, spoil, message):
    corpus, work = places
    proto = read_sentencepiece(candidate_file)
    spoil(proto)
    command = f"step2_merge_tokenizer.py --candidates {save_model(proto, tmp_path)}"
    result = run_step(command, work, tiny_tokenizer_dir, corpus)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(work.glob("step2*")) == []


@pytest.mark.parametrize(
    ("rules", "message"),
    [({"byte_fallback": False}, "no byte fallback"), ({"normalized": True}, "it normalizes text")],
)
def test_steps_1_and_2_reject_a_base_with_another_spec(places, candidate_file, tmp_path, rules, message):
    corpus, work = places
    proto = make_sentencepiece(["▁", "の"], **rules)
    if rules.get("normalized"):
        proto.normalizer_spec.precompiled_charsmap = b"some"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.model").write_bytes(proto.SerializeToString())
    for command in ("step1_train_tokenizer.py", f"step2_merge_tokenizer.py --candidates {candidate_file}"):
        result = run_step(command, work, tmp_path / "base", corpus)
        assert result.returncode == 2
        assert message in result.stderr
        assert list(work.glob("step*")) == []
