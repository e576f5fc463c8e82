"""From files and hub datasets to packed batches: sources -> readers -> converter -> tokenize -> packing -> loader."""
