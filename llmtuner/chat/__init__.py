"""Talking with a model: a dialogue whose answers come piece by piece, on the terminal and as a page in the browser."""
