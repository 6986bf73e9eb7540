"""The commands `python -m mlomae COMMAND`."""
