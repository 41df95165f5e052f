"""Environments that people have, as rlflow's: each imports its package when it is used."""
