"""What every engine is asked, by token, so that no tokenizer is needed."""

TOKENS = [7, 42, 99, 3, 250, 11, 180, 64, 5, 201, 33, 77]
