"""Runs as jobs of a Slurm cluster or of this machine: what to submit, what a job does, how it stands."""
