"""What will be done: steps, the files that they fill, the plan and its hash; no tensor data is read."""
