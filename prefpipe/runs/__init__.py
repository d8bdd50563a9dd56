"""Run directories and the files in them: commits, locks, digests."""
