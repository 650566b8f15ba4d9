"""Tasks on top of a finished run, in the same folder."""
