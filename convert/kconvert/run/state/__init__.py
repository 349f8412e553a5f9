"""What DST/.kconvert says of a run: who may write, which shards are whole, and what is left to close the directory."""
