"""Layouts of samples that people have: one module per family, one recogniser for all."""
