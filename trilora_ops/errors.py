"""The one public error of the pack."""


class TriLoRAError(ValueError):
    """Bad input, in one sentence: field, value, rule and remedy.

    Inner code states the fact; the boundary that knows the file or the node adds file, key, got and expected.
    """
