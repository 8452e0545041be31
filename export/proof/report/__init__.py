"""Reports of a family for people: tables in a terminal, markdown, and one HTML page."""
