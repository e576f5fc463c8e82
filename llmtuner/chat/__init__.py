"""Chatting with a model: a session whose answers stream, in the terminal and on a web page."""
