"""Model card: README.md of a model directory, as the Hugging Face hub shows it, written from the metrics."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmtuner.console import UserError
from llmtuner.eval.language import Languages, languages_of
from llmtuner.eval.scores import score_rows
from llmtuner.files import atomic_write_text
from llmtuner.report.checks import UNKNOWN, get_nested, percent
from llmtuner.report.environment import versions

MODELS = {"base": "base", "zero": "Zero", "pretrained": "pretrained", "chat": "chat"}
STAGES = {"step5": "Continued pretraining:", "step6": "Instruction tuning:"}
PACKAGES = ("torch", "transformers", "peft", "tokenizers")
LICENCE_LINK = "https://huggingface.co/THUDM/chatglm3-6b/blob/main/MODEL_LICENSE"
LICENCE_FILES = ("MODEL_LICENSE", "LICENSE")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = (kind.from_pretrained(NAME) for kind in (AutoTokenizer, AutoModelForCausalLM))
chat = [{"role": "user", "content": QUESTION}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=256)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True).strip())"""


class SafeMarkdown(str):
    """Markdown that is not escaped."""


def write_model_card(
    model_dir: Path,
    metrics: dict[str, dict[str, Any]],
    base: str,
    data: dict[str, dict[str, Any]],
    question: str = "日本で一番高い山は何ですか？",
) -> Path:
    """Writes `model_dir`/README.md; sections without metrics are left out.

    Args:
        metrics: {name of the metrics file: its content}: "step1" to "step7", "suite_ja_chat", ...
        base: the base model's id on the hub, such as "THUDM/chatglm3-6b", or a description of one that is not there. If it
            contains "chatglm", the weights stay under ChatGLM3's licence.
        data: {data set: its entry in dataset_info.json}, without "hf_hub_url" for one that was read from files.
        question: the example's question.

    Raises:
        UserError: if `model_dir` is no model directory, or the card cannot be written.
    """
    if not (model_dir / "config.json").is_file():
        raise UserError(f"{model_dir} is not a model directory: it has no config.json.")
    destination = model_dir / "README.md"
    values = {"NAME": model_dir.resolve().name, "QUESTION": question}
    snippet = re.sub("|".join(values), lambda name: json.dumps(values[name[0]], ensure_ascii=False), SNIPPET)
    content = {"snippet": SafeMarkdown(snippet), **_content(model_dir.resolve(), metrics, base, data)}
    card = _template().render(content)
    atomic_write_text(destination, re.sub(r"\n{3,}", "\n\n", card), errors="replace")
    return destination


def _content(model_dir: Path, metrics: dict[str, Any], base: str, data: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The template's variables; None or empty for what was not measured."""
    mixes = [(title, _mix(get_nested(metrics, step, "data") or {}, data)) for step, title in STAGES.items()]
    mixes = [(title, rows) for title, rows in mixes if rows]
    hubs = list(dict.fromkeys(row["hub"] for _, rows in mixes for row in rows if row["hub"]))
    on_hub = HUB_ID.fullmatch(base) is not None
    descends = "chatglm" in base.lower() or (model_dir / "MODEL_LICENSE").is_file()
    licence = "other" if descends else None if on_hub else "apache-2.0"
    chosen = get_nested(metrics, "step7", "generation", "chosen")
    candidates = get_nested(metrics, "step7", "generation", "candidates")
    languages = languages_of(metrics)
    agreement = {
        languages[language]: identical
        for language in languages.retained
        if (identical := get_nested(metrics, "step7", "agreement", "chat", language, "identical")) is not None
    }
    return {
        "front_matter": SafeMarkdown(_front_matter(languages, base if on_hub else None, licence, hubs)),
        "name": model_dir.name,
        "languages": languages,
        "is_glm": json.loads((model_dir / "config.json").read_text(encoding="utf-8")).get("model_type", "glm") == "glm",
        "base": base,
        "on_hub": on_hub,
        "at": lambda *path: get_nested(metrics, *path),
        "mixes": mixes,
        "models": MODELS,
        "before_after": _before_after(metrics, languages),
        "agreement": agreement,
        "tokens": _tokens(metrics, languages),
        "chosen": chosen,
        "candidates": candidates if chosen else None,
        "suites": [
            _suite(suite, languages) for name, suite in sorted(metrics.items()) if re.fullmatch(r"suite_\w+_chat", name)
        ],
        "unseen": get_nested(metrics, "step7", "accuracy", "chat", languages.unseen),
        "repeated": get_nested(candidates or {}, chosen or "", "repeated_4gram_ratio"),
        "repeated_greedily": get_nested(candidates or {}, "greedy", "repeated_4gram_ratio"),
        "licence": licence,
        "licence_link": SafeMarkdown(LICENCE_LINK),
        "licence_file": next((name for name in LICENCE_FILES if (model_dir / name).is_file()), None),
        "versions": versions(PACKAGES),
    }


def _front_matter(languages: Languages, base: str | None, licence: str | None, hubs: list[str]) -> str:
    """The hub's metadata, as YAML."""
    front = {
        "language": list(languages),
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": licence,
        "license_name": "chatglm3-model-license" if licence == "other" else None,
        "license_link": LICENCE_LINK if licence == "other" else None,
        "datasets": hubs,
    }
    known = {name: value for name, value in front.items() if value}
    return yaml.safe_dump(known, allow_unicode=True, sort_keys=False).rstrip()


def _mix(counts: dict[str, Any], data: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "hub": data.get(name, {}).get("hf_hub_url"),
            "ratio": count.get("ratio"),
            "target_ratio": count.get("target_ratio"),
        }
        for name, count in counts.items()
    ]


def _before_after(metrics: dict[str, Any], languages: Languages) -> list[dict[str, Any]]:
    """One row per metric, one column per model; metrics that no model has are left out."""
    groups = {code: languages.get(code, f"{languages.name}, unseen facts") for code in languages.qa_groups}
    kinds = [
        *((f"accuracy, {name}", ("accuracy", group), percent) for group, name in groups.items()),
        *(
            (f"in the language of the question, {name}", ("language_confusion", group, "response_pass_rate"), percent)
            for group, name in groups.items()
        ),
        *((f"bits per byte, {name}", ("bits_per_byte", code), _decimals) for code, name in languages.items()),
        ("free-form replies: repeated 4-grams", ("repetition", languages.added), percent),
        ("free-form replies: finished", ("free_answers", "finished_ratio"), percent),
        ("free-form replies: longest loop, characters", ("free_answers", "longest_loop"), _count),
    ]
    rows = []
    for name, (kind, *path), shown in kinds:
        figures = [get_nested(metrics, "step7", kind, model, *path) for model in MODELS]
        if any(figure is not None for figure in figures):
            rows.append({"name": name, "figures": [UNKNOWN if figure is None else shown(figure) for figure in figures]})
    return rows


def _tokens(metrics: dict[str, Any], languages: Languages) -> list[tuple[str, float, float]]:
    per_character = {
        code: [get_nested(metrics, "step4", "tokens_per_character", model, code) for model in ("base", "zero")]
        for code in languages
    }
    return [(languages[code], *pair) for code, pair in per_character.items() if None not in pair]


def _suite(suite: dict[str, Any], languages: Languages) -> list[dict[str, Any]]:
    language = languages.get(suite.get("suite", ""), UNKNOWN)
    return [{"language": language, **row} for row in score_rows(suite.get("tasks", {}))]


# ------------------------------------------------------------------------------------------------------------- template
def _template() -> Any:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "percent": percent,
        "count": _count,
        "decimals": _decimals,
        "settings": lambda settings: ", ".join(f"{name} {value}" for name, value in (settings or {}).items()),
        "safe": SafeMarkdown,
    }
    return templates.get_template("model_card.md")


def _escaped(value: Any) -> str:
    """Text that Markdown shows literally, on one line, even in a table cell."""
    if isinstance(value, SafeMarkdown):
        return value
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]<>|&#]|(?<!\w)_|_(?!\w))", r"\\\1", text) if text else ""


def _count(number: float | None) -> str:
    return UNKNOWN if number is None else f"{number:,.0f}"


def _decimals(number: Any) -> str:
    return f"{number:.3f}" if isinstance(number, int | float) else UNKNOWN if number is None else str(number)
