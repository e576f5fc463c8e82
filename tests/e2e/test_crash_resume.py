"""A run that is killed and restarted ends as one that was not."""

import json

from benchmarks import crash_resume


def write_few_texts(directory):
    directory.mkdir()
    for name in ("zh_wiki", "en_wiki", "ja_wiki"):
        texts = [f"{name}: 小镇的第{number}条河，河边种满了柳树。The ferry leaves at {number}." for number in range(60)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (directory / f"{name}.train.jsonl").write_text(lines, encoding="utf-8")


def test_killed_run_ends_like_an_uninterrupted_one(tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(crash_resume, "write_world", write_few_texts)
    file = tmp_path / "crash_resume.json"
    file.write_text('{"2 processes": "of an earlier call"}')
    arguments = ["--kills", "2", "--steps", "40", "--seed", "40", "--model", str(tiny_model_dir)]
    crash_resume.main([*arguments, "--output", str(file)])
    result = json.loads(file.read_text())["1 processes"]
    assert "passed: 2 kills" in capsys.readouterr().out
    assert json.loads(file.read_text())["2 processes"] == "of an earlier call"
    assert len(result["kills"]) == 2
    assert result["problems"] == []
    assert result["largest_difference"] == {"log": 0, "weights": 0}
