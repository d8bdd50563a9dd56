"""One frozen config per command; torch-free, so that reading and checking a recipe is instant."""
