"""What any training program needs, and nothing about audio: options, files, checkpoints, processes, progress."""
