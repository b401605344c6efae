"""The command line: one file a command, each thin; ``main`` puts them together."""
