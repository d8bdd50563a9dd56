"""Ways to look at runs from the terminal: `show`, `runs` and `compare`. They write nothing and read what is there, of
runs that are complete, still going or interrupted."""
