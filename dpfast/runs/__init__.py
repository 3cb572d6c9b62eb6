"""Runs: a recipe carried out stage by stage in a folder of its own."""
