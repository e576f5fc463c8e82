"""Standard benchmarks through EleutherAI's lm-evaluation-harness, with every request in the model's own format."""

import difflib
import hashlib
import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import torch
from transformers import PreTrainedModel

from llmtuner.console import Timer, UserError, progress_bar
from llmtuner.data.chat_template import get_template
from llmtuner.data.template import Message
from llmtuner.eval.bits_per_byte import padded_logits
from llmtuner.eval.generation import batches_by_length, generate_batch, generation_config
from llmtuner.eval.intervals import wilson_interval
from llmtuner.eval.suite_data import LocalSplits, local_datasets
from llmtuner.model.loading import load_for_evaluation
from llmtuner.tokenizer.encoding import encode, encode_batch

HARNESS_REQUIREMENT = "lm_eval==0.4.13"
# MMLU-ProX asks the same questions in all three languages.
SUITES = {
    "ja": [
        "ja_leaderboard_jcommonsenseqa",
        "ja_leaderboard_jnli",
        "ja_leaderboard_marc_ja",
        "ja_leaderboard_jsquad",
        "ja_leaderboard_jaqket_v2",
        "ja_leaderboard_mgsm",
        "ja_leaderboard_xlsum",
        "ja_leaderboard_xwinograd",
        "mmlu_prox_lite_ja",
    ],
    "zh": ["ceval-valid", "cmmlu", "mmlu_prox_lite_zh"],
    "en": ["mmlu", "gsm8k", "hellaswag", "mmlu_prox_lite_en"],
}
# Which of step 7's models answer in the chat format. The Zero model answers as the base does; pretraining unlearns it.
USES_CHAT_TEMPLATE = {"base": True, "zero": True, "pretrained": False, "chat": True}
DEFAULT_MAX_NEW_TOKENS = 256  # the harness's own default


def run_suite(
    suite: str,
    model_dir: Path,
    tasks: list[str] | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    chat: bool = True,
    batch_size: int = 16,
    num_fewshot: int | None = None,
    data_dir: Path | None = None,
    trained_length: int | None = None,
) -> dict[str, Any]:
    """Evaluates a model on the tasks of a suite.

    Multiple-choice requests are plain text, as in published results. Generation requests are in the chat format if `chat`,
    with few-shot examples as earlier turns.

    Args:
        suite: a key of `SUITES`.
        tasks: names of tasks or groups, instead of the suite's own.
        include_path: directory of additional task files. Python functions that they name are run.
        limit: documents per task; all by default. Each subject of a group is a task of its own.
        batch_size: requests in one forward pass.
        num_fewshot: examples before each question; by default what each task specifies.
        data_dir: directory of data files, see `suite_data.local_datasets`.
        trained_length: tokens of a sequence in training, above which questions are counted.

    Returns:
        model, suite, tasks (see `evaluate_tasks`), questions {task: {digest, correct {metric: "0110..."}}} for
        `scores.paired_rows`, context_length (tokens), truncated_requests (too long for the model's context: they lost
        their beginning), trained_length, longer_questions (than that, of all tasks), harness (version), limit, seconds.

    Raises:
        UserError: if the harness is missing, a name is unknown, a task's data is unavailable, or a number is too small.
    """
    if suite not in SUITES:
        raise UserError(f"the suite {suite} is unknown. Choose one of: {', '.join(SUITES)}.")
    for setting, number, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("num_fewshot", num_fewshot, 0)):
        if number is not None and number < least:
            raise UserError(f"{setting} is {number}, but must be at least {least}.")
    if include_path and not include_path.is_dir():
        raise UserError(f"the task directory {include_path} does not exist. Name a directory of task files (*.yaml).")
    timer = Timer()
    names = list(dict.fromkeys(tasks or SUITES[suite]))
    loaded = load_tasks(names, include_path, num_fewshot, data_dir)
    model = ChatGLM3LM(*load_for_evaluation(model_dir), batch_size=batch_size)
    model.trained_length = trained_length
    scores, questions = evaluate_tasks(model, names, loaded, limit, chat)

    import lm_eval

    return {
        "model": str(model_dir),
        "suite": suite,
        "tasks": scores,
        "questions": questions,
        "context_length": model.context_length,
        "harness": lm_eval.__version__,
        "limit": limit,
        "truncated_requests": model.num_truncated,
        "trained_length": trained_length,
        "longer_questions": len(model.longer_questions),
        "seconds": timer.seconds(),
    }


@contextmanager
def patched_harness() -> Iterator[None]:
    """The harness without progress bars for each task's documents, and without metrics that are code from the hub.

    `evaluate.load` downloads a metric as Python code and runs it; datasets has run no code since version 4.0.

    Raises:
        UserError: if the harness is not installed.
    """
    try:
        import datasets
        import evaluate
        import lm_eval.api.task
    except ImportError as error:
        raise UserError(
            f"the suites need the lm-evaluation-harness ({error}): pip install {HARNESS_REQUIREMENT}"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    with (
        patch.object(lm_eval.api.task, "tqdm", lambda documents, **_: documents),
        patch.object(evaluate, "load", _refuse_remote_code),
    ):
        bars_were_disabled = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            if not bars_were_disabled:
                datasets.enable_progress_bars()


@patched_harness()
def load_tasks(
    names: list[str],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    data_dir: Path | None = None,
) -> dict[str, dict[str, dict]]:
    """Loads tasks with their data: {name: {"tasks": {name: Task}, "groups": {name: Group}}}.

    Raises:
        UserError: if the harness is missing, a name is unknown, a task's data is unavailable, or a task is not supported.
    """
    from lm_eval.tasks import TaskManager

    random.seed(0)  # these three are the harness's own seeds
    numpy.random.seed(1234)
    torch.manual_seed(1234)
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):  # reading the harness's 14,000 task files takes 10 seconds
        included, manager = manager.all_tasks, TaskManager(include_path=include_path)
        _check_task_names(names, manager.all_tasks, included, include_path)
    loaded, failed, from_hub = {}, [], False
    for name in names:
        try:
            with local_datasets(data_dir):
                group = manager.load([name])
            for task_name, task in group["tasks"].items():
                if num_fewshot is not None or task.config.num_fewshot is None:
                    task.set_config("num_fewshot", num_fewshot or 0)
                if isinstance(task.dataset, LocalSplits):
                    task.dataset.check_fewshot(task_name, task.config.num_fewshot)
                task.set_fewshot_seed(1234)
            loaded[name] = group
        except Exception as error:  # whatever a task file, its functions or its data raise
            dataset = (manager.task_index[name].cfg or {}).get("dataset_path")
            failed.append(f"{name}{f' (data set {dataset})' if dataset else ''}: {str(error).strip() or repr(error)}")
            from_hub |= not isinstance(error, UserError)
    if failed:
        hint = (
            "\nData sets of the hub are downloaded once and then cached: run this with an internet connection and without "
            "HF_HUB_OFFLINE=1, or put their files (such as jnli.valid.jsonl) into a directory (--data_dir). Data sets that are "
            "code are not run: supply their rows with a task file of your own (--task_dir)."
        )
        lines = "\n  ".join(failed)
        others = f"\nTo evaluate only the others: --tasks {','.join(loaded)}." if loaded else ""
        raise UserError(f"{len(failed)} of {len(names)} tasks cannot be loaded:\n  {lines}{hint * from_hub}{others}")
    for name, task in ((name, task) for group in loaded.values() for name, task in group["tasks"].items()):
        _check_task_supported(name, task)
    return loaded


@patched_harness()
def evaluate_tasks(
    model: "ChatGLM3LM", names: Iterable[str], loaded: dict[str, dict[str, dict]], limit: int | None, chat: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Runs loaded tasks.

    Returns:
        Scores {task, or group if it has a mean: {metric, metric_stderr (where known), metric_interval (95 %, where questions
        are right or wrong), metric_chance (of multiple choice), n (questions), truncated (questions that lost their beginning),
        few_shot}}, and {the same name: {digest of the questions, correct {metric: "0110..."}}}.

    Raises:
        UserError: if a task has fewer examples than `num_fewshot`.
    """
    from lm_eval.evaluator import evaluate

    tasks = {name: task for group in loaded.values() for name, task in group["tasks"].items()}
    raw: dict[str, dict] = {}
    graded = {name: _record_results(task) for name, task in tasks.items()}
    for is_generation in (False, True):  # the harness applies the chat template to all tasks of a call
        selected = {
            name: task for name, task in tasks.items() if (task.OUTPUT_TYPE == "generate_until") == is_generation
        }
        if selected:
            try:
                raw |= evaluate(
                    lm=model,
                    task_dict={"tasks": selected, "groups": {}},
                    limit=limit,
                    apply_chat_template=chat and is_generation,
                    fewshot_as_multiturn=True,
                    log_samples=False,
                    bootstrap_iters=1000,  # only for the few metrics whose standard error has no formula
                )["results"]
            except (AssertionError, ValueError) as error:  # raised if there are fewer examples than requested
                hint = "If there are too few examples, lower num_fewshot."
                raise UserError(f"{', '.join(selected)} cannot be evaluated ({error}). {hint}") from error
    scores, questions = {}, {}
    for name in names:
        group, members = loaded[name]["groups"].get(name), loaded[name]["tasks"]
        results = {task: raw[task] for task in members}
        if group and group.has_aggregation:
            results = {name: group.aggregate(raw)}
        for task, values in results.items():
            averaged = {task: members[task]} if task in members else members
            metrics: dict[str, Any] = _flatten_metrics(values)
            questions[task] = _grades([(averaged[member], graded[member]) for member in averaged], metrics)
            for metric, marks in questions[task]["correct"].items():
                metrics[f"{metric}_interval"] = wilson_interval(marks.count("1"), len(marks))
                if (chance := questions[task].get("chance")) is not None:
                    metrics[f"{metric}_chance"] = chance
            scores[task] = metrics | {
                "n": values["sample_len"],
                "truncated": sum(len(model.truncated_questions[member]) for member in averaged),
                "few_shot": max(member.config.num_fewshot for member in averaged.values()),
            }
    return scores, questions


def _record_results(task: Any) -> list[tuple[Any, dict[str, Any]]]:
    """A list that fills with (question, its metrics) while a task is graded: all questions under one filter, then the next."""
    graded: list[tuple[Any, dict[str, Any]]] = []
    process_results = task.process_results

    def record(doc: Any, results: Any) -> dict[str, Any]:
        metrics = process_results(doc, results)
        graded.append((doc, metrics))
        return metrics

    task.process_results = record
    return graded


def _grades(graded: list[tuple[Any, list[tuple[Any, dict[str, Any]]]]], scores: dict[str, float]) -> dict[str, Any]:
    """Which questions of a task, or of a group's tasks one after the other, were answered correctly.

    Args:
        graded: (task, what `_record_results` recorded).
        scores: those of the task or group. A metric is left out if it is not the share of right answers.

    Returns:
        digest of the questions; correct {metric: "0110..."}; chance, of multiple choice: what guessing scores on average, or
        always the same answer where all questions have the same choices, whichever is more.
    """
    several = len({filters.name for task, _ in graded for filters in task._filters}) > 1
    digest, guesses, answers = hashlib.sha256(), [], Counter[tuple[tuple[str, ...], str]]()
    marks: dict[str, list[float]] = defaultdict(list)
    for task, results in graded:
        num_docs = len(results) // len(task._filters)
        for index, (doc, metrics) in enumerate(results):
            if index < num_docs:
                digest.update(json.dumps(doc, ensure_ascii=False, sort_keys=True, default=str).encode())
                if task.OUTPUT_TYPE == "multiple_choice":
                    choices = tuple(task.doc_to_choice(doc))
                    guesses.append(1 / len(choices))
                    answers[choices, str(task.doc_to_target(doc))] += 1
            for metric, value in metrics.items():
                marks[f"{metric} ({task._filters[index // num_docs].name})" if several else metric].append(value)
    correct = {
        metric: "".join("1" if value else "0" for value in values)
        for metric, values in marks.items()
        if all(isinstance(value, bool | int | float | numpy.generic) and value in (0, 1) for value in values)
        and abs(float(numpy.mean(values)) - scores.get(metric, -1)) < 1e-6
    }
    result: dict[str, Any] = {"digest": digest.hexdigest()[:16], "correct": correct}
    if guesses:
        same_choices = len({choices for choices, _ in answers}) == 1
        most_frequent = max(answers.values()) / len(guesses) if same_choices else 0.0
        result["chance"] = max(sum(guesses) / len(guesses), most_frequent)
    return result


class ChatGLM3LM:
    """A model as the harness calls it (the interface of lm_eval.api.model.LM, without importing it).

    Requests become token ids here: the prefix of a document once, such as `[gMASK] sop`, then text in which no special token
    is recognised. A dialogue arrives as its list of messages, and its roles are added by id (`get_template`), so no text can
    forge one.
    """

    rank, world_size, tokenizer_name = 0, 1, "chatglm3"

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_size: int = 16) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.template = get_template(tokenizer)
        self.context_length: int = model.config.max_position_embeddings
        self.num_truncated = 0
        """Requests that exceeded the context and lost their beginning."""
        self.truncated_questions: dict[str, set[int]] = defaultdict(set)
        """{task: questions of such requests}."""
        self.trained_length: int | None = None
        self.longer_questions: set[tuple[str, int]] = set()
        """(task, question) of requests longer than `trained_length`."""

    def apply_chat_template(self, messages: list[Message], add_generation_prompt: bool = True) -> list[Message]:
        """Leaves a dialogue as it is; `generate_until` encodes it."""
        return messages

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-likelihood, and whether greedy decoding gives it.

        As in the harness's own models, both are encoded as one text, and white space at the boundary belongs to the
        continuation. So does a token that spans the boundary; otherwise part of the continuation would not be scored.
        """
        pairs = [request.args for request in requests]
        complete = encode_batch(self.tokenizer, [context + continuation for context, continuation in pairs])
        contexts = encode_batch(self.tokenizer, [context.rstrip() for context, _ in pairs])
        sequences = []
        for request, ids, context in zip(requests, complete, contexts, strict=True):
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, context, strict=False)))
            prefix = self.template.prefix if shared else self.template.eval_prefix
            fitted = self._fit(request, prefix, ids, self.context_length + 1)  # the last token is not an input
            sequences.append((fitted, max(len(prefix), 1, len(fitted) - len(ids) + shared)))
        return self._score(sequences)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The model's output for each (text or dialogue, settings), up to a stop text or the end of the turn."""
        answers: dict[int, str] = {}
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        with progress_bar(len(requests), "answers") as bar:
            for text, indices in by_settings.items():
                stop_texts, max_new_tokens, settings = _parse_generation_kwargs(json.loads(text))
                max_new_tokens = min(max_new_tokens, self.context_length // 2)  # the rest is the prompt's
                config = generation_config(self.template, settings, max_new_tokens)
                room = self.context_length - max_new_tokens
                selected = [requests[index] for index in indices]
                prompts = [self._fit(request, *self._encode_context(request.args[0]), room) for request in selected]
                for batch in batches_by_length(prompts, self.batch_size, longest_first=True):
                    batch_prompts = [prompts[row] for row in batch]
                    outputs = generate_batch(self.model, self.tokenizer, batch_prompts, config, stop_texts)
                    for row, ids in zip(batch, outputs, strict=True):
                        answers[indices[row]] = self._decode(ids, stop_texts)
                    bar.update(len(batch))
        return [answers[index] for index in range(len(requests))]

    def _fit(self, request: Any, prefix: list[int], ids: list[int], room: int) -> list[int]:
        """The prefix and the end of the request's `ids`, `room` tokens at most, as the harness truncates."""
        excess = max(0, len(prefix) + len(ids) - room)
        if self.trained_length and len(prefix) + len(ids) > self.trained_length:
            self.longer_questions.add((request.task_name, request.doc_id))
        if excess:
            self.num_truncated += 1
            self.truncated_questions[request.task_name].add(request.doc_id)
        return [*prefix, *ids[excess:]]

    def _encode_context(self, context: str | list[Message]) -> tuple[list[int], list[int]]:
        """Prefix, and the token ids after it; those of a dialogue end where the assistant's answer starts or continues.

        What the format has before an answer, such as ChatGLM3's empty metadata line, is part of the prompt: a model that
        generated its newline would meet a task's stop text "\n" before its first word.
        """
        if isinstance(context, str):
            return self.template.prefix or self.template.eval_prefix * (not context), encode(self.tokenizer, context)
        begun = context[-1]["content"] if context[-1]["role"] == "assistant" else ""
        context = context[:-1] if context[-1]["role"] == "assistant" else context
        ids, prefix = self.template.encode_prompt(self.tokenizer, context, begun), self.template.dialogue_prefix
        return prefix, ids[len(prefix) :]

    def _decode(self, ids: list[int], stop_texts: Sequence[str]) -> str:
        """The text of an answer, up to the end of the turn or the first stop text."""
        turn = list(takewhile(lambda token: token not in self.template.stop_token_ids, ids))
        text = self.tokenizer.decode(turn, skip_special_tokens=True)
        return text[: min([text.find(stop) for stop in stop_texts if stop in text], default=None)]

    def _score(self, sequences: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """For each (ids, start): the log-likelihood of ids[start:], and whether each of them is the most likely token."""
        same_input: dict[tuple[int, ...], list[int]] = {}  # choices of one token share a forward pass
        for index, (ids, _) in enumerate(sequences):
            same_input.setdefault(tuple(ids[:-1]), []).append(index)
        inputs = list(same_input)
        scores = [(0.0, True)] * len(sequences)
        with progress_bar(len(sequences), "log-likelihoods") as bar:
            for batch in batches_by_length(inputs, self.batch_size, longest_first=True):
                first = min(sequences[index][1] for row in batch for index in same_input[inputs[row]]) - 1
                logits = padded_logits(self.model, [inputs[row] for row in batch], first)
                for row, log_probabilities in zip(batch, logits.float().log_softmax(-1), strict=True):
                    for index in same_input[inputs[row]]:
                        ids, start = sequences[index]
                        targets = torch.tensor(ids[start:], device=logits.device, dtype=torch.long)
                        predicted = log_probabilities[start - 1 - first : len(ids) - 1 - first]
                        is_greedy = bool((predicted.argmax(-1) == targets).all())
                        scores[index] = (float(predicted.gather(1, targets[:, None]).sum()), is_greedy)
                        bar.update()
        return scores


def _refuse_remote_code(name: str, *_: Any, **__: Any) -> None:
    raise UserError(f"the metric {name} is code from the hub, which is not run. Choose tasks without it (--tasks).")


def _check_task_names(names: list[str], known: list[str], included: list[str], include_path: Path | None) -> None:
    """Checks that all tasks exist.

    Raises:
        UserError: suggests similar names.
    """
    for name in (name for name in names if name not in known):
        similar = difflib.get_close_matches(name, known, 4) or [task for task in known if name in task][:4]
        hint = f" Similar names: {', '.join(similar)}." if similar else ""
        if include_path:
            hint += f" Readable task files in {include_path} define: {', '.join(included) or 'none'}."
        raise UserError(f"the task {name} is unknown.{hint} All names: lm_eval ls tasks")


def _check_task_supported(name: str, task: Any) -> None:
    """Checks that a task needs nothing that is not supported here.

    Raises:
        UserError: names what it needs.
    """
    metrics = getattr(task, "_metric_fn_list", {}).values()
    problems = [
        problem
        for applies, problem in [
            (getattr(task, "UNSAFE_CODE", False), "it runs code that the model generates"),
            (getattr(task, "MULTIMODAL", False), "it has images or audio"),
            (
                task.OUTPUT_TYPE == "loglikelihood_rolling",
                "it measures perplexity, which step 7 reports as bits per byte",
            ),
            (not task.config.process_results and None in metrics, "one of its metrics is code from the hub"),
        ]
        if applies
    ]
    if problems:
        raise UserError(f"the task {name} is not supported: {', '.join(problems)}. Choose others with --tasks.")


def _parse_generation_kwargs(kwargs: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """A task's stop texts, maximum number of new tokens, and remaining arguments of `generate`."""
    until = kwargs.pop("until", None) or []
    limits = [kwargs.pop(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in kwargs]
    if not kwargs.get("do_sample"):  # tasks tend to write temperature 0 for greedy
        kwargs = {name: value for name, value in kwargs.items() if name not in ("temperature", "top_p", "top_k")}
    stop_texts = [text for text in ([until] if isinstance(until, str) else until) if text]
    return stop_texts, [*limits, DEFAULT_MAX_NEW_TOKENS][0], {"do_sample": False, **kwargs}


def _flatten_metrics(values: dict[str, Any]) -> dict[str, float]:
    """The harness's "metric,filter" and "metric_stderr,filter" as "metric" and "metric_stderr"; errors where known.

    The filter is named if there are several.
    """
    keys = [(*key.rsplit(",", 1), value) for key, value in values.items() if "," in key and not isinstance(value, str)]
    several = len({filter_name for _, filter_name, _ in keys}) > 1
    metrics = {}
    for metric, filter_name, value in keys:
        base = metric.removesuffix("_stderr")
        metrics[(f"{base} ({filter_name})" if several else base) + metric.removeprefix(base)] = float(value)
    return metrics
