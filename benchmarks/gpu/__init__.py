"""Steps of ChatGLM3-6B in its full size on one GPU: speed, memory, losses, and the paths that only a GPU takes."""
