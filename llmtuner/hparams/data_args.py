"""Which data sets are read, in which mix, and how they are tokenized and packed."""

from dataclasses import dataclass
from typing import Literal

from llmtuner.hparams.setting import AT_LEAST_1, AT_LEAST_8, RATIO, RATIO_OR_ROWS, setting


@dataclass(frozen=True)
class DataArguments:
    """Settings of the data."""

    dataset: list[str] = setting([], "Names from dataset_info.json; a list, or one string with commas.")
    eval_dataset: list[str] = setting(
        [], "Data sets to evaluate on only, instead of val_size; their texts are not trained on.", resume_safe=True
    )
    dataset_dir: str = setting("data", "Directory of dataset_info.json.")
    corpus_dir: str | None = setting(
        None, "Directory in which file names are looked up; by default dataset_dir.", resume_safe=True
    )
    cache_dir: str = setting("cache", "Where tokenized data sets are kept for the next run.", resume_safe=True)
    tokenized_path: str | None = setting(
        None, "The same under plain names: made once, then used without the texts.", resume_safe=True
    )
    overwrite_cache: bool = setting(False, "Tokenize again, even if nothing has changed.", resume_safe=True)
    packing: bool = setting(True, "Several documents or dialogues in one sequence; false: one each, padded.")
    neat_packing: bool = setting(True, "Packed documents do not attend to one another.")
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = setting(
        "concat", "Every row once, or interleave until one data set is used up (under) or all are (over)."
    )
    interleave_probs: list[float] | None = setting(
        None, "Ratio of each data set in what is drawn, in the order of dataset; must sum to 1."
    )
    interleave_unit: Literal["tokens", "bytes", "rows"] = setting("tokens", "What interleave_probs are ratios of.")
    template: Literal["auto", "chatglm3"] = setting(
        "auto",
        "Chat format of the sft stage: chatglm3, or auto: chatglm3 for its tokenizer, else the base's own template.",
    )
    document_end_token: str | None = setting(
        None,
        "Token that ends a document (pt), if the tokenizer's files do not say which one the base's pretraining used.",
    )
    cutoff_len: int = setting(
        1024, "Tokens in one sequence; a longer document continues in the next, a dialogue is truncated.", AT_LEAST_8
    )
    max_samples: int | None = setting(None, "Read at most this many rows of each data set.", AT_LEAST_1)
    default_system: str | None = setting(
        None, "System message of dialogues without one (sft); give it again when chatting."
    )
    disable_shuffling: bool = setting(False, "Take rows in the order of the files, data set after data set.")
    val_size: float = setting(
        0.0, "Held out of each data set for the eval loss: a ratio, or a number of rows.", RATIO_OR_ROWS
    )
    max_eval_samples: int = setting(512, "Evaluate on at most this many sequences.", AT_LEAST_1, resume_safe=True)
    eval_on_each_dataset: bool = setting(False, "Log eval_<dataset>_loss beside eval_loss.", resume_safe=True)
    preprocessing_num_workers: int = setting(1, "Threads that tokenize.", AT_LEAST_1, resume_safe=True)
    train_on_prompt: bool = setting(False, "Compute the loss on the questions of a dialogue, too.")
    mask_history: bool = setting(
        False, "Compute the loss on the last answer only; a long dialogue then loses its first turns, not its end."
    )
    max_invalid_ratio: float = setting(
        0.05, "Ratio of a data set's rows that may be invalid; more stop the run.", RATIO, resume_safe=True
    )
