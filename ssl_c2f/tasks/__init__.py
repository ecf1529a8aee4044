"""What a user asks for: one file for each command, and for each function of the Python interface."""
