"""Encodings that one engine reads, in files of its own or under names of its own."""
