"""Models in memory: loading, adapters, attention and fused operations; and what a model directory holds."""
