"""One file for each group of commands; `dualray/platform/cli.py` assembles them."""
