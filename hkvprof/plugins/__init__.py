"""Models for evaluation harnesses; each module needs its harness (docs/harnesses.md)."""
