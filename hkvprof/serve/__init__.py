"""A model with a profile behind an OpenAI-compatible address (`hkvprof serve`)."""
