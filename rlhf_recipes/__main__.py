"""`python -m rlhf_recipes` is `rlhf-recipes`."""

from .cli.main import main_cli

if __name__ == "__main__":
    main_cli()
