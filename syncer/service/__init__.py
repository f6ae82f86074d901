"""Things that run: the API, the scheduled flush, the command line."""
