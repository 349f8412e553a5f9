"""A model that is served: what it answers by OpenAI's protocol, and whether an engine's parsers let it through."""
