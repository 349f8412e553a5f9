"""Which engine takes what, and the command that serves it."""
