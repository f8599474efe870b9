"""`python -m rlhf_recipes.cli` is `rlhf-recipes`."""

from .main import main_cli

if __name__ == "__main__":
    main_cli()
