"""The rows of the algorithm table, a file a task, and what a row is."""
