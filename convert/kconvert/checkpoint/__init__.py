"""Checkpoints at rest: containers, files, reads of any byte range."""
