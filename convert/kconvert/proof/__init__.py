"""Checkpoints compared and looked into by ways of their own, never those that wrote them."""
