"""Measures and draws; nothing in the lesson needs it. Run its files as `python -m extras.NAME`."""
import support  # noqa: F401  (first: Ctrl-C ends in one line while PyTorch loads)
