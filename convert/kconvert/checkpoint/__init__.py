"""Checkpoints at rest: headers, files, configuration."""
