"""The commands as functions: what `import prefpipe` offers, and what the command line calls."""
