"""Checkpoints on disk: conversion, new embeddings, merging and GGUF export, a few megabytes of memory at a time."""
