"""F5: one file is one stage, read from top to bottom; `config.py` holds what a recipe may say of each."""
