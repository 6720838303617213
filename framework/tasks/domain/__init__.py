"""Tasks of a domain, on corpora that come with the recipes."""
