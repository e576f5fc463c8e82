"""Tokens per second of generated answers by batch size, as step 7 generates them.

    python -m benchmarks.generate_throughput --work-dir runs/mini --model runs/mini/chat_model

Greedy answers to questions of the miniature's instruction sets. Batch sizes take turns; a ratio is the median over the rounds.
Answers that differ from those generated one at a time (rounding decides near ties) are counted.
"""

from pathlib import Path

from benchmarks.common import Values, make_parser, print_results, run_in_turn, save_results, use_work_dir
from llmtuner.console import run_cli
from llmtuner.data.readers import read_rows
from llmtuner.data.sources import get_dataset_attr
from llmtuner.eval.generation import generate_answers
from llmtuner.model.loading import load_for_evaluation

BATCH_SIZES = {"1 at once": 1, "8 at once": 8, "64 at once": 64}


def main() -> None:
    parser = make_parser(__doc__, "generate_throughput.json", work_dir=None, repeats=5)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=128)
    options = parser.parse_args()
    use_work_dir(options.work_dir)
    import constants

    source = get_dataset_attr("dolly_ja", constants.DATASET_INFO, constants.CORPUS_DIR)
    questions = [row.values["instruction"] for row, _ in zip(read_rows(source), range(options.questions), strict=False)]
    model, tokenizer = load_for_evaluation(options.model)
    first: list[str] = []  # answers generated one at a time

    def run(name: str, _: int) -> Values:
        answers = generate_answers(model, tokenizer, questions, batch_size=BATCH_SIZES[name])
        if not first:
            first.extend(answers.texts)
        changed = sum(one != other for one, other in zip(first, answers.texts, strict=True))
        return {"tokens_per_second": answers.tokens_per_second, "seconds": answers.seconds, "changed_answers": changed}

    def compare(together: list[Values]) -> None:
        for values in together:
            values["ratio"] = together[0]["seconds"] / values["seconds"]

    results = run_in_turn(BATCH_SIZES, options.repeats, run, compare)
    print_results(f"{len(questions)} answers", results)
    save_results(options.output, {"results": results})


if __name__ == "__main__":
    run_cli(main)
