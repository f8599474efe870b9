"""Measuring what training did."""
