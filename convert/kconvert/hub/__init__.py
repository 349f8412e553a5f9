"""Checkpoints on the Hugging Face Hub, through the huggingface_hub client; nothing outside this package imports that."""
