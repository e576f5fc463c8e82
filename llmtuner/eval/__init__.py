"""Evaluation: bits per byte, answers to questions, repetition, language confusion, standard benchmarks."""
