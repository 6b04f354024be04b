"""Groups of settings shared by commands, and the values of command-line names."""
