"""The version of the package, which plans, journals and reports carry."""

__version__ = "0.1.0"
