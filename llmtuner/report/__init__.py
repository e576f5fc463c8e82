"""Reports what a run measured: figures, checks, the report page, the model card."""
