"""Training as a job of a cluster, or of this machine: what it is, how it is written down, started and followed."""
