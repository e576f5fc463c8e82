"""Training: one entry (`tuner`), one linear workflow per stage, one Trainer."""
