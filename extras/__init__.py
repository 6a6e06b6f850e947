"""What measures, draws and experiments; nothing in the lesson needs it. `python -m extras.bench`, ..."""
