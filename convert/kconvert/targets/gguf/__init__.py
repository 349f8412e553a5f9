"""Plans that write GGUF files for llama.cpp, the source's codes and scales in its own blocks."""
