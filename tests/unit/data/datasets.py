"""Data sources, settings and rows that the tests of data share."""

import json
from types import SimpleNamespace

from llmtuner.data.sources import DatasetAttr


def source(path, **keys):
    return DatasetAttr(name="here", files=(str(path),), **keys)


# -------------------------------------------------------------------------------------------------- dataset_info.json
def info(folder, **entries):
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------ messages
ALPACA = DatasetAttr(
    "a", (), columns={"prompt": "q", "query": "in", "response": "a", "history": "before", "system": "rules"}
)
SHAREGPT = DatasetAttr("s", (), formatting="sharegpt")


def turns(*roles):
    names = {"h": "human", "g": "gpt", "s": "system", "o": "observation"}
    return {
        "conversations": [
            {"from": names.get(str(role), role), "value": f"words {number}"} for number, role in enumerate(roles)
        ]
    }


# --------------------------------------------------------------------------------------------------------------- tools
TOOLS = [{"name": "get_weather", "description": "查询天气", "parameters": {"type": "object", "properties": {}}}]
CALL = {"name": "get_weather", "arguments": {"city": "北京", "days": 2, "now": True, "unit": None}}
AS_PYTHON = "```python\ntool_call(city='北京', days=2, now=True, unit=None)\n```"
WITH_TOOLS = DatasetAttr("t", (), formatting="sharegpt", columns={"messages": "conversations", "tools": "tools"})


def calling(tools, *values):
    roles = ("human", "function_call", "observation", "gpt")
    contents = values or ("北京天气", json.dumps(CALL), '{"temp": 20}', "20度")
    return {"tools": tools, "conversations": [{"from": a, "value": b} for a, b in zip(roles, contents, strict=False)]}


# ------------------------------------------------------------------------------------------------------------ examples
def settings(directory, **changed):
    """What `load_tokenized_dataset` reads of DataArguments."""
    given = {
        "dataset_dir": str(directory),
        "corpus_dir": None,
        "cache_dir": str(directory / "cache"),
        "tokenized_path": None,
        "overwrite_cache": False,
        "preprocessing_num_workers": 1,
        "max_samples": None,
        "template": "auto",
        "document_end_token": None,
        "mask_history": False,
        "train_on_prompt": False,
        "default_system": None,
        "max_invalid_ratio": 0.05,
    }
    return SimpleNamespace(**given | changed)


DOCUMENTS = {"file_name": "documents.*", "columns": {"prompt": "text"}}
DIALOGUES = {"file_name": "dialogues.*", "columns": {"prompt": "q", "query": "in", "response": "a"}}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
