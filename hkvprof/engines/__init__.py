"""Engines that serve: hkvprof inside them, one folder each."""
