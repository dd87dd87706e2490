"""The report of a comparison: figures, sections, pages."""
