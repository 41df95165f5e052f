"""The flags of other frameworks, a table each: what they are in a recipe. `rlflow convert` reads commands by them, and
an unknown key of a recipe that one of them has is explained by it."""
