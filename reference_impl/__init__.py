"""Compact sequence models in PyTorch, written from their papers to be read and to be used.

`nn` holds one component a file, `models` one family a file (read top-down: config, blocks, model), `checkpoint` reads
and writes Hugging Face directories. Nothing is imported here: import the file that you need.
"""
