"""Samples of users: records, layouts, images."""
