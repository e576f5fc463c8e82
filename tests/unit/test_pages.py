"""Pages: their links, commands, settings and names exist, their figures are those of the results, in three languages alike."""

import ast
import dataclasses
import json
import re
import shlex
import tomllib
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainingArguments

from benchmarks.ladder import pooled
from benchmarks.real_text import RECIPES
from benchmarks.scaling import flop_per_token
from llmtuner import hparams
from llmtuner.eval.ladder import PIVOT, format_ladder
from llmtuner.hparams import llamafactory
from llmtuner.hparams.setting import find_problem, settings_of
from llmtuner.report.checks import percent
from tests.helpers import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix() for folder in (".", "docs", "benchmarks") for path in (ROOT / folder).glob("*.md")
)
READMES = ("README.md", "README_ja.md", "README_zh.md")
TRAINING_STEPS = ("step5_train_pt_single_gpu.py", "step6_train_sft_single_gpu.py")
# Commands that other projects bring, and variables that they read.
OTHER_COMMANDS = {
    "cd",
    "docker",
    "git",
    "mkdir",
    "tail",
    "curl",
    "export",
    "llama-server",
    "vllm-env/bin/pip",
    "vllm-env/bin/vllm",
    "ssh",
}
OTHER_VARIABLES = {
    "PIP_INDEX_URL",
    "HF_ENDPOINT",
    "LOGLEVEL",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_SOCKET_IFNAME",
}
INSTALLED_ON_DEMAND = {"modelscope": "pip install modelscope"}  # console script -> what the page says before it
OTHER_NAMES = {
    "_name_or_path",
    "build_chat_input",
    "Chatbot",
    "ChildFailedError",
    "device_map",
    "enable_thinking",
    "format_conversation",
    "galore_rank",
    "GPT-NeoX",
    "load_dataset",
    "low_cpu_mem_usage",
    "process_batch",
    "Qwen3",
    "tool_call",
    "TransformersForCausalLM",
}
COMMAND = re.compile(
    r"(?:[A-Z][A-Z0-9_]*=\S+ )*(?:\.venv/bin/\S+|python3?|pip3?|make|bash|torchrun|hf|tensorboard)(?: .*)?"
)


# ---------------------------------------------------------------------------------------------------------- reading pages
@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def split_fences(page: str) -> tuple[str, list[tuple[str, str]]]:
    """The text outside fenced blocks, and the blocks as (language, content)."""
    fence = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
    return fence.sub("", text_of(page)), [(found[1], found[2]) for found in fence.finditer(text_of(page))]


def code_spans(page: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", split_fences(page)[0])]


@cache
def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", split_fences(page)[0], re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def table_below(page: str, first_column: str) -> dict[str, list[str]]:
    """A table by its first column's title: first cell of each row -> the others, without bold type."""
    lines = text_of(page).splitlines()
    start = next(
        i for i, line in enumerate(lines) if line.startswith("|") and line.split("|")[1].strip() == first_column
    )
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip().replace("**", "") for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


def commands(page: str) -> list[str]:
    """Every command of a page: the lines of its shell blocks, and spans of code that begin like one."""
    found = []
    for language, block in split_fences(page)[1]:
        if language == "bash":
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                line = re.sub(r"(^|\s)#.*$", "", line).strip()
                found += [part.strip() for part in re.split(r"&&", line) if part.strip()]
    found += [span for span in code_spans(page) if COMMAND.fullmatch(span) and not span.endswith("benchmarks.")]
    if page == "benchmarks/README.md":  # it leaves out how every command there begins
        names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
        found += [f".venv/bin/python -m benchmarks.{span}" for span in code_spans(page) if span.split()[0] in names]
    return found


def linked_pages(page: str) -> set[str]:
    targets = {
        urlsplit(target).path for target in re.findall(r"\]\(([^)\s]+)\)", split_fences(page)[0]) if "://" not in target
    }
    inside = {((ROOT / page).parent / target).resolve() for target in targets if target.endswith(".md")}
    return {path.relative_to(ROOT).as_posix() for path in inside}


# ----------------------------------------------------------------------------------------------------- what there is
@cache
def sources() -> str:
    """All text of the project but pages, tests and the names of earlier versions."""
    kinds = (".py", ".sh", ".json", ".html", ".toml", ".txt", ".yaml", ".jinja", "Makefile", ".gitignore")
    kept = [
        name
        for name in project_files()
        if name.endswith(kinds) and not name.startswith(("tests/", "llmtuner/aliases.py")) and "/results/" not in name
    ]
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in kept if (ROOT / name).is_file())


@cache
def project_files() -> tuple[str, ...]:
    folders = (".ci", "benchmarks", "data", "docs", "examples", "llmtuner", "mini", "tests")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    return tuple(path.relative_to(ROOT).as_posix() for path in found if path.is_file())


def file_names() -> set[str]:
    return {Path(name).name for name in project_files()}


@cache
def words() -> frozenset[str]:
    return frozenset(re.findall(r"[\w-]+", sources())) | frozenset(re.findall(r"\w+", sources()))


@cache
def settings() -> frozenset[str]:
    names = our_settings().keys() | {field.name for field in dataclasses.fields(TrainingArguments)}
    return names | {"batch", "warmup_ratio"}  # of `show` and, read as warmup_steps, of transformers before version 5


@cache
def our_settings() -> dict[str, Any]:
    groups = (hparams.ModelArguments, hparams.DataArguments, hparams.FinetuningArguments)
    return {name: field for group in groups for name, field in settings_of(group).items()}


@cache
def strings(script: Path) -> frozenset[str]:
    nodes = ast.walk(ast.parse(script.read_text(encoding="utf-8")))
    return frozenset(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


@cache
def flags(script: Path) -> frozenset[str]:
    """The options of a script; a benchmark names those that it shares with others as keywords (`work_dir=...`)."""
    found = {text for text in strings(script) if re.fullmatch(r"--[a-z][\w-]*", text)} | {"--help"}
    if 'f"--{' in script.read_text(encoding="utf-8"):
        found |= {f"--{text}" for text in strings(script) if text.isidentifier()}
    common = script.parent / "common.py"
    if common.is_file():
        keywords = {
            node.arg
            for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
            if isinstance(node, ast.keyword)
        }
        shared = {name for name in strings(common) if name in keywords} | {"output"}
        found |= {f"--{name.replace('_', '-')}" for name in shared}
    return frozenset(found)


@cache
def console_scripts() -> frozenset[str]:
    """The commands of installed packages, and this project's own."""
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    return frozenset(
        point.name for one in distributions() for point in one.entry_points if point.group == "console_scripts"
    ) | frozenset(ours)


def problem_of(command: str, page: str) -> str | None:
    """Why a command of a page cannot be run as it stands."""
    given = shlex.split(command)
    while given and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", given[0]):
        name = given.pop(0).partition("=")[0]
        if name not in OTHER_VARIABLES and name not in words():
            return f"nothing reads the variable {name}"
    if not given:
        return None
    program, *arguments = given
    if program == "export":
        names = [argument.partition("=")[0] for argument in arguments]
        return next((f"nothing reads {name}" for name in names if name not in OTHER_VARIABLES | words()), None)
    if program in ("python", "python3", "pip", "hf", "tensorboard", "torchrun"):
        return (
            None
            if arguments[:2] == ["-m", "venv"] or not arguments
            else f"{program} names no environment: .venv/bin/{program}"
        )
    if program == "make":
        missing = [name for name in arguments if not re.search(rf"^{re.escape(name)}:", text_of("Makefile"), re.M)]
        return f"make has no target {missing[0]}" if missing else None
    if program == "bash":
        script = arguments[0].replace("multi_gpu.sh", "single_gpu.py")
        if not (ROOT / arguments[0]).is_file():
            return f"there is no {arguments[0]}"
        return problem_of_options(arguments[1:], flags(ROOT / script), settings())
    if not program.startswith(".venv/bin/"):
        return None if program in OTHER_COMMANDS else f"{program} is unknown to this test"
    tool = program.removeprefix(".venv/bin/")
    if tool != "python":
        installed = INSTALLED_ON_DEMAND.get(tool)
        return (
            None
            if tool in console_scripts() or (installed and installed in text_of(page))
            else f"{tool} is not installed"
        )
    if not arguments:
        return None
    if arguments[0] == "-m":
        return problem_of_module(arguments[1], arguments[2:])
    script = ROOT / arguments[0]
    if not script.is_file():
        return f"there is no {arguments[0]}"
    return problem_of_options(
        arguments[1:], flags(script), settings() if arguments[0] in TRAINING_STEPS else frozenset()
    )


def problem_of_module(module: str, arguments: list[str]) -> str | None:
    if module in ("pip", "venv", "pytest"):
        return None
    if module == "llmtuner":
        if arguments and arguments[0] not in strings(ROOT / "llmtuner" / "__main__.py"):
            return f"llmtuner has no command {arguments[0]}"
        return problem_of_options(arguments[1:], flags(ROOT / "llmtuner" / "__main__.py"), settings())
    folder = ROOT / module.replace(".", "/")
    script = folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")
    return problem_of_options(arguments, flags(script)) if script.is_file() else f"there is no module {module}"


def problem_of_options(arguments: list[str], known: frozenset[str], names: frozenset[str] = frozenset()) -> str | None:
    given = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    wrong = [flag for flag in given if flag not in known and flag.removeprefix("--") not in names]
    return f"unknown option {wrong[0]}" if wrong else None


# -------------------------------------------------------------------------------------------------------------- checks
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", split_fences(page)[0]):
        link = urlsplit(target)
        if link.scheme:
            assert link.scheme == "https", target
            assert "." in link.netloc, target
            continue
        path = (ROOT / page).parent / link.path if link.path else ROOT / page
        assert path.exists(), f"{page}: {target} does not exist"
        if link.fragment:
            name = path.resolve().relative_to(ROOT).as_posix()
            assert link.fragment in anchors(name), f"{page}: {name} has no heading for #{link.fragment}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_pasted(page):
    problems = {command: problem for command in commands(page) if (problem := problem_of(command, page))}
    assert not problems


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("python step7_eval_chat.py", "names no environment"),
        (".venv/bin/python step8.py", "there is no step8.py"),
        (".venv/bin/python step7_eval_chat.py --chats", "unknown option --chats"),
        (".venv/bin/python step5_train_pt_single_gpu.py --learning_rates 1e-4", "unknown option --learning_rates"),
        (".venv/bin/python -m llmtuner merge FILE.yaml", "no command merge"),
        (".venv/bin/python -m benchmarks.nothing", "no module"),
        ("WORKDIR=x make demo", "nothing reads the variable WORKDIR"),
        ("make demos", "no target demos"),
        ("bash step5_train_pt_multi_gpu.sh --lora_ranks 8", "unknown option --lora_ranks"),
        (".venv/bin/modelscopes download", "modelscopes is not installed"),
    ],
)  # fmt: skip
def test_a_command_that_does_not_exist_is_noticed(command, problem):
    assert problem in (problem_of(command, "README.md") or "")


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page):
    from llmtuner.data.sources import DatasetAttr

    known = settings() | {field.name for field in dataclasses.fields(DatasetAttr)} | set(vars(GenerationConfig()))
    spans = (re.fullmatch(r"([a-z][a-z0-9_]*): (\S.*)", span) for span in code_spans(page))
    named = {found[1]: found[2] for found in spans if found}
    known |= {*llamafactory.known_names(), *OTHER_NAMES}
    assert named.keys() <= known
    if page != "docs/from-llamafactory.md":  # which also says what is refused
        given = {name: yaml.safe_load(value) for name, value in named.items() if name in our_settings()}
        assert not [problem for name, value in given.items() if (problem := find_problem(our_settings()[name], value))]
    if page == "docs/settings.md":
        first = [cell for cell in table_below(page, "setting") for cell in re.findall(r"`(\w+)", cell)]
        assert len(first) > 20
        assert set(first) <= settings()


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page):
    """Identifiers, files and paths in code spans occur in the project; so nothing keeps a name that was changed."""
    for span in code_spans(page):
        if re.fullmatch(r"(llmtuner|tests|docs|benchmarks|mini|data|examples)/[\w./-]*", span):
            assert (ROOT / span).exists(), f"{page}: {span} does not exist"
        elif re.fullmatch(r"[\w<>-]+(/[\w<>.-]+)*/?", span) and "/" in span:
            last = span.rstrip("/").rpartition("/")[2]
            assert set(re.findall(r"[\w-]+", last)) <= words() | {"PROFILE"}, f"{page}: nothing writes {span}"
        elif re.fullmatch(r"\w+\.(py|sh|json|jsonl|html|png|md|txt|toml|yaml|jinja|model)", span):
            assert span in sources() or span in file_names(), f"{page}: nothing is called {span}"
        elif re.fullmatch(r"[A-Za-z_][\w.]*", span) and re.search(r"_|[a-z][A-Z]|\.", span):
            missing = [part for part in span.split(".") if part not in words() | settings() | OTHER_NAMES]
            assert not missing, f"{page}: nothing is called {span}"


def test_the_ten_tasks_are_as_near_as_the_index_says():
    rows = [
        line.strip("|").split("|") for line in text_of("docs/README.md").splitlines() if re.search(r"\| \d \|$", line)
    ]
    assert len(rows) == 10
    for task, answer, steps in rows:
        target = re.findall(r"\]\(([\w-]+\.md)", answer)[-1]
        assert distance(f"docs/{target}") == int(steps), task


def distance(page: str) -> int:
    """Links from the README to a page."""
    reached, steps = {"README.md"}, 0
    while page not in reached:
        reached |= {target for one in reached for target in linked_pages(one)}
        steps += 1
        assert steps < 5, f"{page} cannot be reached"
    return steps


def test_the_index_names_every_page():
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= linked_pages("docs/README.md") | {
        "docs/README.md"
    }


def test_the_contents_of_the_decisions_are_its_headings():
    page = split_fences("docs/decisions.md")[0]
    headings = re.findall(r"^##+ (.+)$", page, re.M)
    assert re.findall(r"^ *- \[(.+)\]\(#", page, re.M) == headings


@pytest.mark.parametrize("page", READMES)
def test_a_readme_is_short(page):
    assert len(text_of(page).splitlines()) <= 170


@pytest.mark.parametrize("page", READMES[1:])
def test_the_readmes_say_the_same(page):
    def shape(name: str) -> Any:
        prose, blocks = split_fences(name)
        tables = re.findall(r"(?:^\|.*\n)+", prose, re.M)
        return {
            "headings": re.findall(r"^(#+) ", prose, re.M),
            "commands": [command for command in commands(name) if "PIP_INDEX_URL" not in command],
            "blocks": [language for language, _ in blocks],
            "tables": [(table.count("\n"), table.splitlines()[0].count("|")) for table in tables],
            "links": {re.sub(r"_(ja|zh)\.md$", ".md", target) for target in re.findall(r"\]\(([^)\s]+)\)", prose)},
            "numbers": set(re.findall(r"\d[\d.,]*\d|\d", re.sub(r"\]\([^)]*\)", "", prose))),
        }

    ours, english = shape(page), shape("README.md")
    for what in ("headings", "commands", "blocks", "tables"):
        assert ours[what] == english[what], what
    assert ours["links"] >= english["links"]
    assert ours["numbers"] >= english["numbers"]


# -------------------------------------------------------------------------------------------------------------- figures
def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


METHODS = {
    "the original's (20,000 tokens, score 0)": "original",
    "the same under the base's rules (digits stay single)": "original, base's rules",
    "its tokens filtered and ranked below (no continued BPE)": "the same pieces, filtered, below",
    "steps 1 and 2": "continued BPE, as many as original",
    "the original's list, its method": "seed list, original",
    "the original's list, filtered and filled up (`--start`)": "seed list, filtered, filled up by continued BPE",
}


def test_the_table_of_merges_is_the_measured_one():
    merges, rows = results("merge_methods")["merges"], table_below("docs/tokenizer-merge.md", "method")
    assert rows.keys() == METHODS.keys()
    for name, cells in rows.items():
        one = merges[METHODS[name]]
        changed = [one[text]["beyond_quotes"] for text in ("zh", "en", "code")]
        ratios = [one["ja"][text] for text in ("ja_aozora", "ja_guides", "ja_wiki")]
        assert cells == [
            f"{one['added']:,}",
            *(f"{ratio:.3f}" for ratio in ratios),
            *(f"{n:,}" for n in changed),
            str(one["unreachable"]),
        ]


def test_the_readme_tells_what_the_merge_changes():
    merges = results("merge_methods")["merges"]
    ours, original = merges["continued BPE, as many as original"], merges["original"]
    ratios = ours["ja"].values()
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times" in text_of("README.md")
    assert [ours[text]["beyond_quotes"] for text in ("zh", "en", "code")] == [0, 0, 0]
    zh, en, code = (f"{original[text]['beyond_quotes']:,}" for text in ("zh", "en", "code"))
    assert f"changes {zh}, {en} and {code}" in " ".join(text_of("README.md").split())


def test_the_readme_tells_the_measured_speed():
    def speedup(job: str, name: str) -> str:
        return f"{results('compare_trainers')[job]['results'][name]['speedup']:.2f} times"

    text = " ".join(text_of("README.md").split())
    assert f"{speedup('pt', 'Trainer + peft')} transformers' Trainer" in text
    assert f"{speedup('pt', 'LLaMA-Factory, no checkpointing')} LLaMA-Factory without gradient checkpointing" in text
    assert f"{speedup('sft', 'LLaMA-Factory, neat packing, no checkpointing')} LLaMA-Factory with packing" in text


def test_zero2_traffic_is_that_of_the_formula():
    measured, rows = results("scaling"), table_below("docs/zero2-traffic.md", "trained")
    for cells, count in zip(rows.values(), measured["trained"].values(), strict=True):
        sent = [
            f"{gigabytes:.2f} GB" for gigabytes in (sent_gb(count, 4, 4), sent_gb(count, 4, 16), 1.5 * count * 4 / 1e9)
        ]
        assert cells == [f"{count / 1e6:.0f} M", *sent, *(f"{12 * count / gpus / 1e9:.1f} GB" for gpus in (1, 4))]
    one, four, ddp = measured["measured"]
    counted = " ".join(text_of("docs/zero2-traffic.md").split())
    assert f"{one['counted'] / 1e6:.2f} MB a step against {one['formula'] / 1e6:.2f} by the formula" in counted
    for case in (four, ddp):
        assert f"{case['counted'] / 1e6:.2f} against {case['formula'] / 1e6:.2f}" in counted


def sent_gb(parameters: int, gpus: int, micro_batches: int) -> float:
    """What ZeRO-2 sends per step and GPU: reduced gradients of each micro-batch, gathered parameters once; 2 bytes each."""
    return (micro_batches + 1) * (gpus - 1) / gpus * parameters * 2 / 1e9


def test_hours_on_four_cards_are_those_of_the_formula():
    trained = results("scaling")["trained"]["LoRA + embeddings"]
    row = next(
        line
        for line in text_of("benchmarks/scaling.md").splitlines()
        if line.startswith("| RTX 4090, PCIe") and ".8 |" in line  # the hours
    )
    tokens_per_second = float(row.split("|")[2].replace(",", ""))
    recomputed, kept = (flop_per_token(results("scaling")["trained"]["LoRA"], whether) for whether in (True, False))
    for name, cells in table_below("docs/multi-gpu.md", "micro-batch x accumulation, activations").items():
        accumulation = int(name.split()[2].strip(","))
        sent = sent_gb(trained, 4, accumulation)
        computing = 16_384 / tokens_per_second * (kept / recomputed if "kept" in name else 1)
        seconds = computing + (accumulation + 3 / 4) * trained * 2 / 8e9  # at 8 GB/s, around the ring
        hours = 1e9 / 4 * seconds / 16_384 / 3600
        assert cells[0] == f"{sent:.1f} GB"
        assert float(cells[1]) == pytest.approx(hours, abs=0.1)  # the speed is rounded there


def test_what_chatglm3_takes_is_what_was_measured():
    jobs = {one["job"]: one for one in results("full_size_checkpoint")["results"]}
    rows = table_below("docs/chatglm3-6b.md", "")
    for name, job in {
        "copying the files, to compare": jobs["cp"],
        "`.venv/bin/python -m llmtuner convert`": jobs["convert"],
        "step 3": jobs["resize, converted"],
        "merging an adapter, at the end of steps 5 and 6": jobs["merge"],
    }.items():
        disk, memory, seconds, source = rows[name]
        assert (disk, seconds, source) == (f"{job['gigabytes']:.1f} GB", f"{job['seconds']:.0f} s", "measured")
        assert memory == ("" if name.startswith("copying") else f"{job['peak_megabytes'] / 1e3:.1f} GB")
    for card in ("RTX 4090", "RTX 3090"):
        table = [
            line.split("|")
            for line in text_of("benchmarks/scaling.md").splitlines()
            if line.startswith(f"| {card}, PCIe")
        ]
        assert rows[f"step 5 on one {card}"][2] == f"{float(table[-1][3]):.0f} h for 1B tokens"
    assert f"| {peak('LoRA + embeddings, 8-bit Adam'):.1f} GB of the GPU |" in text_of("docs/chatglm3-6b.md")
    assert f"{peak('LoRA + new tokens'):.1f} GB even with the" in text_of("docs/chatglm3-6b.md")


def peak(recipe: str) -> float:
    """GB of a step with one sequence a micro-batch and gradient checkpointing."""
    cases = [one for one in results("memory_budget")["recipes"] if one["trained"] == recipe and one["batch_size"] == 1]
    return next(one["total"] for one in cases if one["recomputed"]) / 1e9


def test_real_text_is_learned_as_measured():
    measured, base = results("real_text"), results("real_base")
    recipes, before = measured["recipes"], measured["before"]
    tokens = {run["tokens"] for run in measured["runs"] if RECIPES[run["recipe"]].share == 1}
    yours, evidence, decisions = (
        " ".join(text_of(f"docs/{page}.md").split()) for page in ("your-texts", "evidence", "decisions")
    )
    assert len(tokens) == 1
    assert (
        f"from {before['ja']:.2f} to {recipes['default']['ja']['mean']:.2f} bits per byte in {max(tokens):,} tokens"
        in yours
    )
    assert f"then {max(tokens):,} tokens of Japanese" in evidence
    assert (
        f"{before['ja']:.3f} for Japanese, {before['zh']:.3f} for Chinese and {before['en']:.3f} for English"
        in evidence
    )
    bits = base["bits_per_byte"]
    assert f"Chinese with {bits['zh']:.2f} and English with {bits['en']:.2f} bits" in evidence
    assert f"on {base['tokens']:,} tokens" in evidence
    by_seed = {(run["recipe"], run["seed"]): run["bits_per_byte"] for run in measured["runs"]}
    faster, usual = by_seed["lr_2", 42], by_seed["default", 42]
    assert (
        f"learns {usual['ja'] - faster['ja']:.3f} bits more Japanese and costs {faster['zh'] - usual['zh']:.3f}"
        in evidence
    )
    share, _, high = measured["tokens_needed"]["original_lr"]["share"]
    assert high > 1
    assert f"learning rate**: {share:.0%}".replace("%", " %") in evidence
    staged, new_rows, crossing = (
        recipes[name]["ja"]["difference"] for name in ("staged", "new_rows", "no_neat_packing")
    )
    assert "learn {:.3f} bits per byte of Japanese less than together ({:.3f} to {:.3f}".format(*staged) in decisions
    assert "{:.3f} bits per byte of Japanese are lost ({:.3f} to {:.3f})".format(*crossing) in decisions
    assert f"for {new_rows[0]:.3f} bits of Japanese" in evidence
    assert f"Muon at the same rates learns {recipes['full_muon']['ja']['difference'][0]:.3f} bits less" in evidence
    regained = 1 - recipes["new_rows_lr_2"]["ja"]["difference"][0] / new_rows[0]
    assert abs(regained - 1 / 3) < 0.02
    for name in ("zh", "en"):
        assert recipes["new_rows"][name]["mean"] - before[name] < 0.03
    lost = [recipes["default"][name]["mean"] - before[name] for name in ("zh", "en")]
    assert "default loses {:.3f} and {:.3f}".format(*lost) in decisions
    random_output, rank_8, rank_128 = (recipes[name] for name in ("random_output", "rank_8", "rank_128"))
    assert f"cost {random_output['ja']['difference'][0]:.3f} bits of Japanese" in evidence
    lost = [random_output[name]["difference"][0] for name in ("ja", "zh")]
    assert "cost {:.3f} bits per byte of Japanese after training on real text, and {:.3f} of".format(*lost) in decisions
    tokens_of_original = recipes["original_tokens"]["ja"]["difference"]
    assert (
        "by {:.3f} bits on average, but the interval reaches from {:.3f} to {:+.3f}".format(
            -tokens_of_original[0], *tokens_of_original[1:]
        )
        in evidence
    )
    assert f"the higher rank {rank_8['ja']['difference'][0]:.3f}" in evidence
    ranks = [recipes[name]["ja"]["mean"] for name in ("rank_8", "default", "rank_128")]
    assert "end at {:.3f}, {:.3f} and {:.3f}".format(*ranks) in evidence
    assert (
        "learns {:.3f} bits per byte of Japanese less than 32 ({:.3f} to {:.3f})".format(*rank_8["ja"]["difference"])
        in decisions
    )
    more, low, high = (-value for value in rank_128["ja"]["difference"])
    assert f"128 learns {more:.3f} more ({high:.3f} to {low:.3f})" in decisions
    lost = [rank_128[name]["difference"][0] for name in ("zh", "en")]
    assert "for {:.3f} and {:.3f} more lost".format(*lost) in decisions
    assert staged[1] < recipes["half"]["ja"]["difference"][0] < staged[2]  # "ends where `half` does"
    for phrase, name, languages in (
        ("learns {:.3f} bits more Japanese and costs {:.3f} of Chinese, more than anything", "ja_100", ("ja", "zh")),
        ("costs {:.3f} bits of Japanese and gives back {:.3f} of Chinese", "ja_50", ("ja", "zh")),
        ("no more Japanese and loses {:.3f} of Chinese and {:.3f} of English", "embedding_lr_4", ("zh", "en")),
        ("**LoRA+** learns {:.3f} bits more Japanese and loses {:.3f} and {:.3f}", "loraplus", ("ja", "zh", "en")),
        ("training ends {:.3f} bits worse in Japanese and {:.3f} in Chinese", "rank_128_rslora", ("ja", "zh")),
        ("they end {:.3f} bits above `default`", "sentencepiece_tokens", ("ja",)),
    ):
        assert phrase.format(*(abs(recipes[name][code]["difference"][0]) for code in languages)) in evidence
    more, lost, less = (
        abs(recipes[name][code]["difference"][0])
        for name, code in (("ja_100", "ja"), ("ja_100", "zh"), ("ja_50", "ja"))
    )
    assert (
        f"{more:.3f} bits per byte more of Japanese are learned from real text and {lost:.3f} of Chinese" in decisions
    )
    assert f"for replay, {less:.3f} fewer are learned" in decisions
    assert recipes["ja_100"]["zh"]["mean"] == max(recipe["zh"]["mean"] for recipe in recipes.values())


def test_what_the_second_base_showed():
    measured, first, base = results("real_text_2"), results("real_text")["recipes"], results("real_base_2")
    recipes = measured["recipes"]
    evidence, decisions = (" ".join(text_of(f"docs/{page}.md").split()) for page in ("evidence", "decisions"))

    def behind(name, *languages):
        return [abs(recipes[name][code]["difference"][0]) for code in languages]

    assert (
        "Chinese with {zh:.2f} and English with {en:.2f} bits per byte. On it".format(**base["bits_per_byte"])
        in evidence
    )
    for language in ("ja", "zh", "en"):
        assert abs(recipes["default"][language]["mean"] - first["default"][language]["mean"]) < 0.0115
        assert max(map(abs, recipes["adam_8bit"][language]["difference"])) <= 0.0031
        assert recipes["wsd_lr_half"][language]["difference"][2] < 0
    muon = [one["full_muon"]["ja"]["difference"][0] for one in (recipes, first)]
    assert "`full_muon` {:.3f} behind it in Japanese instead of {:.3f}".format(*muon) in evidence
    for phrase, name, languages in (
        (
            "whole one: by {:.3f} bits in Japanese, {:.3f} in Chinese and {:.3f} in English",
            "wsd_lr_half",
            ("ja", "zh", "en"),
        ),
        ("it learns {:.3f} bits more Japanese and loses {:.3f} and {:.3f} of the others", "wsd", ("ja", "zh", "en")),
        ("cost {:.3f} bits of Japanese, of which", "random", ("ja",)),
        ("learns {:.3f} bits more Japanese and loses {:.3f} of Chinese. - **rsLoRA", "focus", ("ja", "zh")),
        ("{:.3f} bits better than rank 32", "rank_128_rslora_alpha", ("ja",)),
    ):
        assert phrase.format(*behind(name, *languages)) in evidence
    assert (
        "{:.3f} bits of Japanese ({:.3f} to {:+.3f})".format(*recipes["full_muon_lr_4"]["ja"]["difference"]) in evidence
    )
    longer = [abs(recipes["wsd_double"][code]["mean"] - recipes["double"][code]["mean"]) for code in ("ja", "zh", "en")]
    assert "{:.3f} bits more Japanese and loses {:.3f} of Chinese and {:.3f} of English, as".format(*longer) in evidence
    halved = behind("wsd_lr_half", "ja", "zh", "en")
    assert f"{halved[0]:.3f} bits per byte more of Japanese than the cosine" in decisions
    assert "loses {:.3f} and {:.3f} less of Chinese and English".format(*halved[1:]) in decisions
    assert (
        "FOCUS is {:.3f} ahead of the mean there and costs {:.3f} of".format(*behind("focus", "ja", "zh")) in decisions
    )
    assert "as well, {:.3f}.".format(*behind("random", "ja")) in decisions


def test_a_killed_run_ends_as_the_page_says():
    for name, one in results("crash_resume").items():
        assert len(one["kills"]) == 10, name
        assert set(one["largest_difference"].values()) == {0.0}
        assert not one["problems"]


DEMO, FRESH = (ROOT / "benchmarks" / "results" / f"{name}.json" for name in ("demo", "fresh_questions"))


@pytest.mark.skipif(not DEMO.is_file(), reason="no results of make demo: .venv/bin/python -m benchmarks.demo_results")
def test_the_tables_of_the_demo_are_those_of_its_results():
    metrics = results("demo")["step7"]
    generation = metrics["generation"]["candidates"]
    rows = [
        [name, *map(percent, metrics["accuracy"][name].values()),
         *(f"{metrics['bits_per_byte'][name][code]:.3f}" for code in ("ja", "zh", "en")), percent(metrics["repetition"][name]["ja"])]
        for name in metrics["accuracy"]
    ]  # fmt: skip
    tried = [
        [name, percent(one["repeated_4gram_ratio"]), f"{one['longest_loop']} characters", percent(one["finished_ratio"]), percent(one["accuracy"])]
        for name, one in generation.items()
    ]  # fmt: skip
    for page in READMES:
        assert cells_of(page, "bits/byte") == rows
    assert [cells[:-1] for cells in cells_of("docs/evaluation.md", "longest loop")] == tried  # speed is the machine's


def test_the_ladder_is_that_of_the_demos_results():
    ladder = results("demo")["step7"]["ladder"]
    assert format_ladder(ladder) in (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    untold = [ladder["chat"][entities] for entities in ("untold_named", "untold_unnamed")]
    for form, key in (("ja_ja", "names_subject"), ("ja_zh", "accuracy"), ("zh_ja", "accuracy"), (PIVOT, "accuracy")):
        low, high = sorted(round(100 * cells[form][key]) for cells in untold)
        for page in READMES:
            assert re.search(rf"{low}( to |〜){high} %", text_of(page)), (page, form)


def test_what_crosses_over_is_what_was_measured():
    runs, lost, page = results("ladder"), results("ladder_values")["results"].values(), text_of("docs/evidence.md")
    section = " ".join(page[page.index("## What crosses over") :].split())

    def runs_of(recipe, part="recipes"):
        return [one for one in runs[part]["runs"] if one["recipe"] == recipe]

    def mean(part, entities, form, key="accuracy", recipe="default"):
        return round(100 * fmean(one["ladder"][entities][form][key] for one in runs_of(recipe, part)))

    def span(part, form, key="accuracy"):
        return sorted({mean(part, entities, form, key) for entities in ("untold_named", "untold_unnamed")})

    def preferred(group, form, language):
        return round(100 * fmean(one["preferred"][group][form][language] for one in lost))

    def right(recipe):
        return round(100 * fmean(one["accuracy"]["ja"] for one in runs_of(recipe)))

    def untold(recipe, form):
        cells = [pooled(one["ladder"], ("untold_named", "untold_unnamed"), form) for one in runs_of(recipe)]
        return round(100 * fmean(cells))

    told = sorted(mean("recipes", "told", form) for form in ("ja_zh", "zh_ja", PIVOT))
    answers = [
        round(
            100
            * fmean(one["accuracy_pretrained"][language] for one in runs[part]["runs"] if one["recipe"] == "default")
        )
        for part in ("recipes", "before")
        for language in ("zh", "en")
    ]
    for text, figures in (
        ("now {} % of the answers name", span("recipes", "ja_ja", "names_subject")),
        ("answer, in {} to {} %.", (told[0], told[-1])),
        ("is answered in {} to {} % (before, {} to {} %)", span("recipes", "zh_ja") + span("before", "zh_ja")),
        ("how what is known is said, in {} to {} %", span("recipes", "ja_zh")),
        ("both steps at once in {} to {} %", span("recipes", "ja_ja")),
        ("says {} to {} % of it", span("recipes", PIVOT)),
        ("({} and {} % instead of {} and {} %)", answers),
        ("is preferred in {} %; told, in {} %", [preferred(group, "ja_zh", "zh") for group in ("untold", "told")]),
        ("word is preferred in {} %, against {} %", [preferred(group, "ja_zh", "ja") for group in ("untold", "told")]),
        (
            "in {} % below a Japanese question, and in {} %",
            [preferred("untold", form, "zh") for form in ("ja_ja", "zh_ja")],
        ),
        ("its value is given in {} %", [round(100 * fmean(one["reading"]["zh"] for one in lost))]),
        (
            "14 and 18 % of the told is right where question and name are in two languages, {} and {} % of the untold, and {} %",
            [untold("no_bridges_longer", form) for form in ("zh_ja", "ja_zh", "ja_ja")],
        ),
        (
            "{} instead of {} % of the untold are right in Chinese questions with Japanese names, and {} instead of {} %",
            [untold(recipe, form) for form in ("zh_ja", "ja_ja") for recipe in ("no_switched", "default")],
        ),
        (
            "{} and {} instead of {} % are right in Chinese questions with Japanese names, {} and {} instead of {} % in Japanese "
            "questions with Chinese names, and {} and {} instead of {} % with",
            [
                untold(recipe, form)
                for form in ("zh_ja", "ja_zh", PIVOT)
                for recipe in ("no_alongside", "no_parallel", "default")
            ],
        ),
        (
            "{} instead of {} % of the untold are right in Japanese questions with Chinese names, and {} instead of {} %",
            [untold(recipe, form) for form in ("ja_zh", PIVOT) for recipe in ("no_crosslingual", "default")],
        ),
        (
            "{}, {} and {} % of the untold are right in Chinese questions with Japanese names, and {}, {} and {} % in Japanese",
            [untold(recipe, form) for form in ("zh_ja", "ja_ja") for recipe in ("half", "default", "double")],
        ),
    ):
        assert text.format(*figures) in section
    scores = [[one["accuracy"]["ja"] for one in runs_of(recipe)] for recipe in ("wsd_lr_half", "default")]
    first = [round(100 * found[0]) for found in scores]
    assert "alone, {} % in Japanese against {}, looked".format(*first) in section
    assert abs(fmean(scores[0]) - fmean(scores[1])) < 0.01  # not told apart
    assert "{} instead of {} % with the pivot.".format(*(untold(name, PIVOT) for name in ("mlp", "default"))) in section
    decisions = " ".join(text_of("docs/decisions.md").split())
    for text, figures in (
        ("{} % right answers instead of {} %", [right(name) for name in ("sft_layers_faster", "default")]),
        (
            "names are answered in {} % instead of {} %",
            [mean("recipes", "told", "ja_zh", recipe=name) for name in ("sft_layers_faster", "default")],
        ),
        ("the untold, {} % instead of {} %", [untold(name, PIVOT) for name in ("sft_layers_faster", "default")]),
    ):
        assert text.format(*figures) in decisions
    bits = results("demo")["step7"]["bits_per_byte"]["chat"]
    assert f"{bits['ja']:.2f} bits per byte of Japanese instead of" in decisions
    assert f"{bits['zh']:.2f} instead of 0.49 of Chinese, {bits['en']:.2f} instead of" in decisions


def test_the_three_readmes_show_one_table():
    assert (
        cells_of("README.md", "bits/byte")
        == cells_of("README_ja.md", "bits/byte")
        == cells_of("README_zh.md", "bits/byte")
    )


def cells_of(page: str, title: str) -> list[list[str]]:
    """The rows of a table in a block of text, below its header."""
    block = next(block for _, block in split_fences(page)[1] if title in block)
    return [re.split(r"  +", line.strip()) for line in block.splitlines()[2:]]


def quoted_answers(page: str) -> list[tuple[str, str, str]]:
    """Question, base's answer and chat model's in a README, without what it says about them in brackets."""
    lines = [line.strip("|").split("|") for line in text_of(page).splitlines() if re.match(r"\| [^|]*[。？]", line)]
    return [tuple(re.sub(r" ?[(（].*", "", cell).strip() for cell in cells) for cells in lines]


def test_quoted_answers_of_the_base_are_its_own(opened_base):
    for page in READMES:
        assert len(quoted_answers(page)) == 2
        for question, answer, _ in quoted_answers(page):
            assert opened_base(question) == answer


@pytest.fixture(scope="module")
def opened_base():
    """Greedy answers of the miniature's base model."""
    base = ROOT / "mini" / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)  # as step 7 loads it on a CPU

    def answer(question: str) -> str:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    return answer


def test_quoted_answers_of_the_chat_model_are_those_of_the_demo():
    given = {row["question"]: row["chat"] for row in results("demo")["answers"]}
    for page in READMES:
        assert all(given[question] == answer for question, _, answer in quoted_answers(page))
    serving = text_of("docs/serving.md")
    asked = [question for question in given if question in serving]
    assert len(asked) == 1
    assert f"```text\n{given[asked[0]]}\n```" in serving


@pytest.mark.skipif(not FRESH.is_file(), reason="no results of benchmarks.fresh_questions")
def test_fresh_questions_are_answered_as_measured():
    groups = results("fresh_questions")["results"]["own settings"]["groups"]  # as the model is shipped
    for page in READMES:
        for group in ("zh", "en", "ja"):
            one = groups[group]
            assert f"{100 * one['right'] / one['asked']:.1f} %" in text_of(page)
