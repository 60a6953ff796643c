"""Training recipes. Each script reads like those of TRL: `python -m trl_recipes.<name> --help`."""
