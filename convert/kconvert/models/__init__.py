"""What a checkpoint holds: manifests, and tensors gathered into weights with role, shape and format."""
