"""Checkpoints on the Hugging Face Hub, through the huggingface_hub client; nothing outside this package imports that."""

from kconvert.checkpoint.hub.repository import HubCheckpoint, open_repository

__all__ = ["HubCheckpoint", "open_repository"]
