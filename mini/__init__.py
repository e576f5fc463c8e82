"""The embedded miniature: a closed world told in three languages, and a small chat model that knows it in two of them."""
