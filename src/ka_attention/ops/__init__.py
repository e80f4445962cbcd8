"""The mechanism: imports torch only, knows no model and no experiment."""
