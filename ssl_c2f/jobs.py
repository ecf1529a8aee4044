"""Where jobs that were queued by an earlier version look for their class."""

from ssl_c2f.launch.jobs import Job

__all__ = ["Job"]
