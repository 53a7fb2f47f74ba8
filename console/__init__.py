"""The command line: flags, errors and exit statuses, Ctrl-C, streams, and what a run reports."""
