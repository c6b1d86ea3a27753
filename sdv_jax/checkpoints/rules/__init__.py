"""Conversion rules: one table per component, read in both directions."""
