"""From files and hub data sets to packed batches: sources -> examples -> packing."""
