"""HTML pages, charts, and tables in a terminal."""
