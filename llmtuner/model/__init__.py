"""Models on disk and in memory: loading, growing embeddings, attaching and merging adapters."""
