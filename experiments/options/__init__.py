"""Groups of settings that commands share, and what the names on a command line stand for."""
