"""The order in which things are computed: run.py starts stages, online.py and offline.py are the two loops."""
