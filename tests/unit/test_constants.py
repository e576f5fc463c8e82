"""constants.py and the environment variables it reads."""

import pytest

from tests.scripts import start


@pytest.mark.slow
def test_empty_directories_are_unset(monkeypatch):
    code = "import constants; print(constants.CORPUS_DIR, constants.WORK_DIR, constants.BASE_MODEL_DIR)"
    empty = dict.fromkeys(("PROFILE", "WORK_DIR", "CORPUS_DIR", "BASE_MODEL_DIR"), "")
    for name in empty:
        monkeypatch.delenv(name, raising=False)
    assert start(["-c", code], **empty).stdout == start(["-c", code]).stdout != ""


def test_texts_of_ones_own_need_no_set_that_the_miniatures_have(tmp_path):
    """The same files as before and as for ChatGLM3-6B, though the miniature's own texts are mixed otherwise."""
    code = "import constants; p = constants.PROFILE; print(*p.tokenizer_mix, *p.pretraining_mix, *p.instruction_sets, p.init_output)"
    own, mini, large = (
        start(["-c", code], **variables).stdout.split()
        for variables in ({"CORPUS_DIR": str(tmp_path)}, {"CORPUS_DIR": ""}, {"PROFILE": "chatglm3-6b"})
    )
    assert own == large
    assert "crosslingual" in mini
    assert mini[-1] == "glossary"
    copied = {"WORK_DIR": str(tmp_path), "CORPUS_DIR": str(tmp_path / "corpus")}
    assert start(["-c", code], **copied).stdout.split() == mini
