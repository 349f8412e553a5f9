"""The first layers and experts of a real checkpoint, in the form that it has."""
