"""The package of this name on PyPI (0.9.10dev), whose import asks for libraries of the web."""

raise ImportError("No module named 'pyramid_mailer'")
