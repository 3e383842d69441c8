"""Bulk scoring: reads tables of images, decodes while devices compute, keeps a journal of finished chunks."""
