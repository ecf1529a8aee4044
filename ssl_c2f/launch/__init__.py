"""Runs as jobs on a Slurm cluster or on this machine: what to submit, what a job does, its state."""
