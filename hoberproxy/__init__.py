"""hoberproxy: an OpenAI-compatible endpoint that relays LLM streams."""

__version__ = "0.1.0"
