"""Gradient strategies, one per site."""
