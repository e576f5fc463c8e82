"""From files and hub data sets to packed batches: sources -> messages -> examples -> tokens -> packing."""
