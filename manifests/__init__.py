"""One TOML a model family; read by `kconvert.manifest`."""
