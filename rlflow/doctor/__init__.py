"""What stands between this machine and a run: what is installed, what there is to run on, what can be reached."""
