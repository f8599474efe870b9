"""A recipe becomes a run. README.md says what each file is for."""
