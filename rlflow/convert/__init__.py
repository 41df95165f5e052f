"""Command lines and configurations of other frameworks as recipes.

script -- shell.py --> commands -- commands.py --> an invocation: framework, verb, flags, processes
       -- the framework's table of flags, and folds of several --> a draft -- text.py --> a recipe with comments
"""

from rlflow.convert.conversion import Conversion, convert

__all__ = ["Conversion", "convert"]
