"""Recipes as values. Standard library only, so that importing one costs milliseconds.

values     the frozen dataclasses
arguments  which arguments of the trainers a recipe may not set, and why
ranges     which numbers and words the settings may be
overrides  changing one by `replace` or `key=value`, to and from JSON
lookup     finding recipes and functions by name
"""
