"""prefpipe: offline preference optimization with a reference cache you can trust."""

__version__ = "0.1.0"
