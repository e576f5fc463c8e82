"""Shows what was measured: figures, checks, one page."""
