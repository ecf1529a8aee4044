"""What any training program needs, independent of audio: options, files, checkpoints, processes, progress."""
