"""Files: written whole or not at all. Knows no model and no tensor operation."""
