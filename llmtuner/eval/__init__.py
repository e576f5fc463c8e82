"""What a model can do: bits per byte, answers to questions, repetition, and figures."""
