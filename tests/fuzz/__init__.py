"""Bad inputs for every reader: `python -m fuzz --help`, from the folder of the tests."""
