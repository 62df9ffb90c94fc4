"""The package's version, for those who must not import the package's rest."""

VERSION = "0.1.0"
