"""A compact trainer that extends a chat model to a new language, in the shape and with the argument names of LLaMA-Factory."""
