"""GGUF files held to the checkpoint that they were made of: their tensors, and what they say of the model."""
