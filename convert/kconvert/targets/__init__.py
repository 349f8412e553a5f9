"""The kinds of output: each makes, of a model and a recipe, steps, a container and texts."""
