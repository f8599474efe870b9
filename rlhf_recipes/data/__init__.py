"""From any source to the columns that a stage's trainer takes.

read         files, Hub datasets and functions -> numbered rows
rows         what a row may hold, and what makes it unusable
split        which prompts are held out
tokens       chat templates, and the one tokenization that all stages share
prepare      all of it for a stage
hub          the Hub, which may not answer
sources      public data sets by name, with their conversions
check        what a stage will do with some data, in small memory
check_rows   its pass over the rows: counts, lengths, first rows
check_index  its database: duplicates, contradictions, shared prompts
check_page   its report, for the terminal
text         texts of models and data as people read them
"""
