"""Standard suites through EleutherAI's lm-evaluation-harness, each request in the form in which ChatGLM3 was trained."""

import difflib
import json
import logging
import random
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from llmtuner.console import Timer, UserError, format_table, print0, progress
from llmtuner.data.template import Message, Template
from llmtuner.files import atomic_write_json, check_writable
from llmtuner.model.loading import load_for_evaluation
from llmtuner.tokenizer.fast import encode, encode_batch

HARNESS_REQUIREMENT = "lm_eval==0.4.13"
SUITES = {
    "ja": [
        f"ja_leaderboard_{task}"
        for task in ("jcommonsenseqa", "jnli", "marc_ja", "jsquad", "jaqket_v2", "mgsm", "xlsum", "xwinograd")
    ],
    "zh": ["ceval-valid", "cmmlu"],
    "en": ["mmlu", "gsm8k", "hellaswag"],
}
# Which of step 7's models answer in the chat format. The Zero model answers as the base does; pretraining unlearns it.
USES_CHAT_TEMPLATE = {"base": True, "zero": True, "pretrained": False, "chat": True}
DEFAULT_MAX_NEW_TOKENS = 256  # the harness's default where a task names no number


def run_suite(
    suite: str,
    model_dir: Path,
    output: Path | None = None,
    tasks: list[str] | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    chat: bool = True,
    batch_size: int = 16,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Measures a model by a suite's tasks, prints a table and writes `output` as JSON.

    Multiple choice is asked in plain text, as published results are; what is to be written is asked in the chat format
    if `chat`, the examples being earlier turns.

    Args:
        suite: a key of `SUITES`.
        tasks: names of tasks or groups, instead of the suite's own.
        include_path: directory with task files of one's own. They may name Python functions, which then run.
        limit: documents of each task; all by default. A group's subjects are tasks of their own.
        batch_size: requests that the model reads at once.
        num_fewshot: examples before each question; as each task says by default.

    Returns:
        model, suite, tasks {name: {metric, metric_stderr (where it is known), n (documents), few_shot}}, harness
        (version), limit, truncated_requests (too long for the model: they lost their beginning), seconds.

    Raises:
        UserError: if the harness is missing, a name is unknown, a task's data cannot be had, or a number is below 1.
    """
    if suite not in SUITES:
        raise UserError(f"the suite {suite} is unknown. Choose one of: {', '.join(SUITES)}.")
    for setting, number, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("num_fewshot", num_fewshot, 0)):
        if number is not None and number < least:
            raise UserError(f"{setting} is {number}, but must be at least {least}.")
    if include_path and not include_path.is_dir():
        raise UserError(f"the task directory {include_path} does not exist. Name a directory of task files (*.yaml).")
    if output:
        check_writable(output.parent)
    stopwatch = Timer()
    names = list(dict.fromkeys(tasks or SUITES[suite]))
    loaded = load_tasks(names, include_path, num_fewshot)
    model = ChatGLM3LM(*load_for_evaluation(model_dir), batch_size=batch_size)
    scores = evaluate_tasks(model, names, loaded, limit, chat)

    import lm_eval

    result = {
        "model": str(model_dir),
        "suite": suite,
        "tasks": scores,
        "harness": lm_eval.__version__,
        "limit": limit,
        "truncated_requests": model.num_truncated,
        "seconds": stopwatch.seconds(),
    }
    print0(format_scores(scores))
    if model.num_truncated:
        print0(
            f"{model.num_truncated:,} requests exceeded the model's {model.context_length:,} tokens and lost their beginning."
        )
    if output:
        atomic_write_json(output, result)
    return result


def load_tasks(
    names: list[str], include_path: Path | None = None, num_fewshot: int | None = None
) -> dict[str, dict[str, dict]]:
    """The harness's tasks with their data: {name: {"tasks": {name: Task}, "groups": {name: Group}}}.

    Raises:
        UserError: if the harness is missing, a name is unknown, a task's data cannot be had, or it cannot be measured.
    """
    try:
        import evaluate
        import lm_eval.api.task
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"the suites need the lm-evaluation-harness ({error}): pip install {HARNESS_REQUIREMENT}"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    lm_eval.api.task.tqdm = lambda documents, **_: documents  # a bar for each of 57 subjects says nothing
    evaluate.load = (
        _refuse_remote_code  # fetches a metric as Python from the hub and runs it; datasets runs no code since 4.0
    )
    random.seed(0)  # these three are the harness's own seeds
    numpy.random.seed(1234)
    torch.manual_seed(1234)

    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):  # reading the harness's 14,000 task files takes 10 seconds
        own, manager = manager, TaskManager(include_path=include_path)
        _check_task_names(names, manager.all_tasks, own.all_tasks, include_path)
    loaded, failed = {}, []
    for name in names:
        try:
            loaded[name] = manager.load([name])
        except Exception as error:  # whatever a task file, its functions or its data raise
            data = (manager.task_index[name].cfg or {}).get("dataset_path")
            failed.append(f"{name}{f' (data set {data})' if data else ''}: {str(error).strip() or repr(error)}")
    if failed:
        others = f" Or measure the others: --tasks {','.join(loaded)}." if loaded else ""
        raise UserError(
            f"{len(failed)} of {len(names)} tasks cannot be loaded:\n  "
            + "\n  ".join(failed)
            + "\nA data set of the hub is fetched once and then kept: run this with a connection and without "
            "HF_HUB_OFFLINE=1. One that the hub offers as code only is not run: bring its rows in a task file of your own "
            f"(--task_dir).{others}"
        )
    for name, task in ((name, task) for group in loaded.values() for name, task in group["tasks"].items()):
        _check_task_supported(name, task)
        if num_fewshot is not None or task.config.num_fewshot is None:
            task.set_config("num_fewshot", num_fewshot or 0)
        task.set_fewshot_seed(1234)
    return loaded


def evaluate_tasks(
    model: "ChatGLM3LM", names: Iterable[str], loaded: dict[str, dict[str, dict]], limit: int | None, chat: bool
) -> dict[str, dict[str, float]]:
    """Runs loaded tasks: {task, or group where it has a mean: {metric, metric_stderr, n, few_shot}}."""
    from lm_eval.evaluator import evaluate

    tasks = {name: task for group in loaded.values() for name, task in group["tasks"].items()}
    raw: dict[str, dict] = {}
    for written in (False, True):  # the harness applies the chat format to a whole run
        alike = {name: task for name, task in tasks.items() if (task.OUTPUT_TYPE == "generate_until") == written}
        if alike:
            try:
                raw |= evaluate(
                    lm=model,
                    task_dict={"tasks": alike, "groups": {}},
                    limit=limit,
                    apply_chat_template=chat and written,
                    fewshot_as_multiturn=True,
                    log_samples=False,
                    bootstrap_iters=1000,  # only for the few metrics whose error has no formula
                )["results"]
            except (AssertionError, ValueError) as error:  # so it says that there are fewer examples than asked for
                few = "Where it is examples that are too few, lower num_fewshot."
                raise UserError(f"{', '.join(alike)} cannot be asked ({error}). {few}") from error
    scores = {}
    for name in names:
        group = loaded[name]["groups"].get(name)
        own = loaded[name]["tasks"]
        rows = {name: group.aggregate(raw)} if group and group.has_aggregation else {one: raw[one] for one in own}
        for row, values in rows.items():
            few_shot = {task.config.num_fewshot for one, task in own.items() if row in (name, one)}
            scores[row] = _flatten_metrics(values) | {"n": values["sample_len"], "few_shot": max(few_shot)}
    return scores


def format_scores(scores: dict[str, dict[str, float]]) -> str:
    """Lays out what `evaluate_tasks` returns, one metric a line."""
    rows = []
    for task, values in scores.items():
        for metric, value in values.items():
            if metric in ("n", "few_shot") or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr")
            rows.append([task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"])
            rows[-1] += [f"{values['n']:,}", str(values["few_shot"])]
    return format_table(["task", "metric", "score", "±", "documents", "few-shot"], rows)


class ChatGLM3LM:
    """A model as the harness asks for it; it looks for these names only, so nothing of it is imported to define them.

    All requests become ids here: first the prefix `[gMASK] sop`, once, then text in which nothing is read as a special
    token. A dialogue arrives as its list of messages and gets its roles as ids (`Template`), so no text can forge one.
    """

    rank, world_size, tokenizer_name = 0, 1, "chatglm3"

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_size: int = 16) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.template = Template.from_tokenizer(tokenizer)
        self.context_length: int = model.config.max_position_embeddings
        """Tokens that the model reads at once."""
        self.num_truncated = 0
        """Requests that were longer and lost their beginning."""
        # What a call of generate leaves open comes from here, and a saved repetition penalty would bend greedy answers.
        model.generation_config = GenerationConfig(
            eos_token_id=self.template.stop_token_ids, pad_token_id=tokenizer.pad_token_id, use_cache=True
        )

    def apply_chat_template(self, messages: list[Message], add_generation_prompt: bool = True) -> list[Message]:
        """What stands for a dialogue until `generate_until` gets it: itself."""
        return messages

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation) the continuation's log-likelihood, and whether it is the greedy one.

        As in the harness's own models both are encoded as one text, and white space before the boundary counts to the
        continuation; so does a piece that spans it, or a part of the continuation would not be counted at all.
        """
        pairs = [request.args for request in requests]
        wholes = encode_batch(self.tokenizer, [context + continuation for context, continuation in pairs])
        contexts = encode_batch(self.tokenizer, [context.rstrip() for context, _ in pairs])
        rows = []
        for whole, context in zip(wholes, contexts, strict=True):
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, context, strict=False)))
            ids = self._fit(whole, self.context_length + 1)  # the last one is not read
            rows.append((ids, max(len(self.template.prefix), len(ids) - len(whole) + shared)))
        return self._score(rows)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model writes after each (text or dialogue, settings), up to a stop text or the end of its turn."""
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        for text, chosen in alike.items():
            stops, new_tokens, settings = _generation_settings(json.loads(text))
            new_tokens = min(new_tokens, self.context_length // 2)  # the question gets half the window at least
            room = self.context_length - new_tokens
            prompts = {index: self._fit(self._prompt(requests[index].args[0]), room) for index in chosen}
            for batch in self._batches(sorted(prompts, key=lambda index: len(prompts[index]), reverse=True), "answers"):
                written = self._write([prompts[index] for index in batch], stops, new_tokens, settings)
                for index, answer in zip(batch, written, strict=True):
                    answers[index] = answer
        return answers

    def _fit(self, ids: list[int], room: int) -> list[int]:
        """The prefix and the end of `ids`: at most `room` tokens."""
        prefix = self.template.prefix
        too_many = max(0, len(prefix) + len(ids) - room)
        self.num_truncated += too_many > 0
        return [*prefix, *ids[too_many:]]

    def _prompt(self, context: str | list[Message]) -> list[int]:
        """Ids behind the prefix; of a dialogue up to where the assistant's next words stand, or go on.

        The assistant's metadata line is given, as an empty one: a model that wrote its newline would meet a task's stop
        text "\\n" before its first word.
        """
        if isinstance(context, str):
            return encode(self.tokenizer, context)
        begun = [context[-1]["content"]] if context[-1]["role"] == "assistant" else []
        ids = self.template.encode_prompt(self.tokenizer, context[: len(context) - len(begun)])
        answer = [one for text in ("\n", *begun) for one in encode(self.tokenizer, text)]
        return ids[len(self.template.prefix) :] + answer

    def _batches(self, items: list[Any], description: str) -> Iterable[list[Any]]:
        starts = range(0, len(items), self.batch_size)
        return progress([items[start : start + self.batch_size] for start in starts], description, unit="batch")

    @torch.no_grad()
    def _score(self, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of `ids[start:]` for each (ids, start), and whether each of them is the likeliest."""
        same_input: dict[tuple[int, ...], list[int]] = {}  # choices of one token are one reading
        for index, (ids, _) in enumerate(rows):
            same_input.setdefault(tuple(ids[:-1]), []).append(index)
        results = [(0.0, True)] * len(rows)
        # the longest first, so that too little memory shows at once
        for batch in self._batches(sorted(same_input, key=len, reverse=True), "log-likelihoods"):
            longest = len(batch[0])
            first = min(rows[index][1] for read in batch for index in same_input[read]) - 1  # position that is needed
            padded = torch.tensor([[*read, *[0] * (longest - len(read))] for read in batch], device=self.model.device)
            # Padding stands on the right, where a causal model cannot see it from inside a text: no mask is needed.
            logits = self.model(input_ids=padded, use_cache=False, logits_to_keep=longest - first).logits
            for read, own in zip(batch, logits.float().log_softmax(-1), strict=True):
                for index in same_input[read]:
                    ids, start = rows[index]
                    targets = torch.tensor(ids[start:], device=own.device, dtype=torch.long)
                    scored = own[start - 1 - first : len(ids) - 1 - first]
                    greedy = bool((scored.argmax(-1) == targets).all())
                    results[index] = (float(scored.gather(1, targets[:, None]).sum()), greedy)
        return results

    def _write(
        self, prompts: list[list[int]], stops: list[str], new_tokens: int, settings: dict[str, Any]
    ) -> list[str]:
        """Answers to a batch of prompts, cut before the first stop text."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        device = self.model.device
        written = self.model.generate(  # type: ignore[operator]
            input_ids=torch.tensor([[0] * pad + ids for pad, ids in zip(padding, prompts, strict=True)], device=device),
            attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=device),
            max_new_tokens=new_tokens,
            stopping_criteria=StoppingCriteriaList([_StopTexts(self.tokenizer, stops, longest)] if stops else []),
            **settings,
        )
        ended = self.template.stop_token_ids
        answers = []
        for ids in written[:, longest:].tolist():
            turn = list(takewhile(lambda one: one not in ended, ids))
            answer = self.tokenizer.decode(turn, skip_special_tokens=True)
            answers.append(answer[: min([answer.find(stop) for stop in stops if stop in answer], default=None)])
        return answers


class _StopTexts(StoppingCriteria):
    """Ends a row of a batch once a stop text stands in what it wrote."""

    def __init__(self, tokenizer: Any, stops: list[str], start: int) -> None:
        self.tokenizer, self.stops, self.start = tokenizer, stops, start
        self.reach = max(len(stop.encode("utf-8")) for stop in stops) + 2  # tokens; one spells a byte at least

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore[override]
        ends = input_ids[:, max(self.start, input_ids.shape[1] - self.reach) :].tolist()
        texts = self.tokenizer.batch_decode(ends, skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)


def _refuse_remote_code(name: str, *_: Any, **__: Any) -> None:
    """Stands in for `evaluate.load`.

    Raises:
        UserError: always.
    """
    raise UserError(f"the metric {name} is code from the hub, which is not run. Choose tasks without it (--tasks).")


def _check_task_names(names: list[str], known: list[str], own: list[str], include_path: Path | None) -> None:
    """Makes sure that all tasks are known.

    Raises:
        UserError: names those that are similar to one that is not.
    """
    for name in (name for name in names if name not in known):
        near = difflib.get_close_matches(name, known, 4) or [one for one in known if name in one][:4]
        hint = f" Similar names: {', '.join(near)}." if near else ""
        if include_path:
            hint += f" Readable task files in {include_path} define: {', '.join(own) or 'none'}."
        raise UserError(f"the task {name} is unknown.{hint} All names: lm_eval ls tasks")


def _check_task_supported(name: str, task: Any) -> None:
    """Makes sure that a task asks for nothing that is not done here.

    Raises:
        UserError: says what it asks for.
    """
    metrics = getattr(task, "_metric_fn_list", {}).values()
    problems = [
        problem
        for found, problem in [
            (getattr(task, "UNSAFE_CODE", False), "it runs code that the model writes"),
            (getattr(task, "MULTIMODAL", False), "it shows pictures or sounds"),
            (task.OUTPUT_TYPE == "loglikelihood_rolling", "it measures perplexity, for which step 7 has bits per byte"),
            (not task.config.process_results and None in metrics, "one of its metrics is code from the hub"),
        ]
        if found
    ]
    if problems:
        raise UserError(f"the task {name} cannot be measured here: {', '.join(problems)}. Choose others with --tasks.")


def _generation_settings(asked: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """A task's stop texts, its greatest number of new tokens, and what else it asks of generate."""
    until = asked.pop("until", None) or []
    numbers = [asked.pop(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in asked]
    if not asked.get("do_sample"):  # tasks like to say temperature 0 where they mean greedy
        asked = {key: value for key, value in asked.items() if key not in ("temperature", "top_p", "top_k")}
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    return stops, [*numbers, DEFAULT_MAX_NEW_TOKENS][0], {"do_sample": False, **asked}


def _flatten_metrics(values: dict[str, Any]) -> dict[str, float]:
    """The harness's "metric,filter" and "metric_stderr,filter" as "metric" and "metric_stderr"; errors where known.

    The filter is named where there are several.
    """
    keys = [(*key.rsplit(",", 1), one) for key, one in values.items() if "," in key and not isinstance(one, str)]
    several = len({filtered for _, filtered, _ in keys}) > 1
    tidy = {}
    for metric, filtered, value in keys:
        base = metric.removesuffix("_stderr")
        named = f"{base} ({filtered})" if several else base
        tidy[named + metric.removeprefix(base)] = float(value)
    return tidy
