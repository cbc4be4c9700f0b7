"""Fuzzers of everything that hkvprof reads from strangers (SECURITY.md says what they look for)."""
