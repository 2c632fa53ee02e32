"""The one fixed order in which a model is split and scheduled."""
