"""Offline: from samples and a model to a profile."""
