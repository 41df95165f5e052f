"""`rlflow ui`: the runs of a directory in a browser, live; start, stop, resume and talk to them.

browser -- guard (host, origin, token) -- api -- runs, run_rows        what runs left, read only
                                              -- recipes, commands     `rlflow plan`, `rlflow run` as processes
                                              -- chat                  `rlflow serve` as a process
"""
