"""What measures, draws and experiments; nothing in the lesson needs it. `python -m extras.bench`, ..."""
import support.start  # noqa: F401  (first: Ctrl-C ends in one line while PyTorch loads)
