"""Figures as inline SVG, for the report of a night and for the files that train writes beside its model."""
