"""Outputs whose weights get one of several encodings, by a recipe in a file."""
