"""New tokens for a sentencepiece tokenizer: training, merging, comparison, and the result as a fast tokenizer."""
