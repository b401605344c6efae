"""StackWise trains transformers from scratch, Stack by Stack, inside a memory budget."""

__version__ = "0.1.0"
