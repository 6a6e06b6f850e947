"""What the lesson stands on: options, files, the Hub, processes, the fast loss. A reader may skip it."""
