"""The project at work, in the terminal and as a picture."""
