"""The command line, `coop-hf`: what a person types; the work is done in the other rooms."""
