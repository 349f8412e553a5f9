"""What a sample of a Kimi has more than the release: transformers' form of the tokenizer beside tiktoken's."""

from __future__ import annotations

import json
from pathlib import Path


def as_released(root: Path) -> Path:
    """The sample with the tokenizer files that Moonshot's repositories have."""
    if (root / "tiktoken.model").exists():
        (root / "tokenizer.json").unlink()
        path = root / "tokenizer_config.json"
        classes = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
        settings = {**json.loads(path.read_text()), "tokenizer_class": "TikTokenTokenizer", "auto_map": classes}
        path.write_text(json.dumps(settings))
    return root
