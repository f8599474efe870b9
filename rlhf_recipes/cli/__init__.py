"""How a user speaks to the package: one file a command. The only room in which functions import what does the work."""
