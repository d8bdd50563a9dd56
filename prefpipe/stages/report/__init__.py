"""`prefpipe report`: one HTML page about a run, or about all rounds of `iterate`."""
