"""From audio files on disk to batches of waveforms."""
