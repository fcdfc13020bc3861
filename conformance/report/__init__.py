"""Reports: the JSON of a run and its schema, the terminal output, the field matrix, the comparison of two runs."""
