"""`python -m mlomae plan`: memory, time and communication of a run that is not started."""
