"""Japanese pieces for a Chinese-English tokenizer: training, merging, and the result as a fast tokenizer."""
