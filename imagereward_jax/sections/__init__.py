"""Sections of the config: typed, documented field by field, checked."""
