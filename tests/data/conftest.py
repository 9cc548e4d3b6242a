"""Nothing in this folder is a test: pytest would import the scripts to look for examples in them."""

collect_ignore_glob = ["*.py"]
