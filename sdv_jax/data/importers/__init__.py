"""Importers: one small file per layout in which users and publishers keep their data."""
