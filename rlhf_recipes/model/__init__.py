"""The one base, its roles, and sampling from them. README.md says what each file is for."""
