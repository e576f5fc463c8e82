"""The settings of a run under LLaMA-Factory's names: one dataclass a group, and a parser that reports all problems at once."""

from llmtuner.hparams.data_args import DataArguments as DataArguments
from llmtuner.hparams.finetuning_args import EMBEDDING_MODULES as EMBEDDING_MODULES
from llmtuner.hparams.finetuning_args import FinetuningArguments as FinetuningArguments
from llmtuner.hparams.model_args import ATTN_IMPLEMENTATIONS as ATTN_IMPLEMENTATIONS
from llmtuner.hparams.model_args import ModelArguments as ModelArguments
from llmtuner.hparams.parser import TrainArgs as TrainArgs
from llmtuner.hparams.parser import diff_settings as diff_settings
from llmtuner.hparams.parser import get_train_args as get_train_args
from llmtuner.hparams.parser import parse_overrides as parse_overrides
from llmtuner.hparams.parser import read_args as read_args
from llmtuner.hparams.parser import serialize_settings as serialize_settings
